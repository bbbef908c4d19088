"""The processes of a run, and a network under its optimiser, sharded among them."""
