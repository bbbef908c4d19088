"""The process and its surroundings, loaded without torch: command lines, streams, files, launchers."""
