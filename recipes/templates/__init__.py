"""Files that `ipfm new` writes under another name, each a whole objective or weighting that runs as it is."""
