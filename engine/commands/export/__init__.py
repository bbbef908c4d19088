"""`ipfm export`: models in formats that other programs read: ONNX, plain PyTorch, a folder for Hugging Face, EDM's."""
