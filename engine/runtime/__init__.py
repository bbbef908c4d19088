"""The process and its surroundings: command lines, streams, files, launchers. Loads without torch."""
