"""What the pages of `ipfm report` and `ipfm compare` are made of."""
