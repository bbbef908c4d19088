"""`ipfm plan`: memory, time, and what to rent."""
