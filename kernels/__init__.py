"""Fused operations: each one a PyTorch reference and a Triton kernel behind one validated public function."""
