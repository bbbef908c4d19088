"""The `ipfm` command: a subcommand is a file, or a folder where it needs more than one."""
