"""Checkpoints of other programs, read without running anything in them; `reader.open_checkpoint` is the door."""
