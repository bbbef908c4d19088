"""A report about a run, from what its folder holds: `read_run` -> `facts_of` -> `write_page`."""
