"""The subcommands of `ipfm`, one file each."""
