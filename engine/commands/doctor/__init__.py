"""`ipfm doctor`: what this machine is, what runs on it, and whether that is right, fast and as large as planned."""
