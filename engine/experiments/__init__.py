"""What a recipe file is an instance of: its options, the way from the command line to a run, ablations."""
