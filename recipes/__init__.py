"""One file a dataset: a base configuration and its variants."""
