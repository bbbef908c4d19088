"""`ipfm sample`."""
