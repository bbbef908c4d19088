"""`ipfm report`: a page about a run, from what its folder holds."""
