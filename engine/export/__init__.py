"""Models in formats that other programs read: ONNX, plain PyTorch, a folder for Hugging Face."""
