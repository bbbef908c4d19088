"""A run: what is trained, the loop around it, its folder and checkpoints."""
