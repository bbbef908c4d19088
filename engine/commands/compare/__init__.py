"""`ipfm compare`: several runs beside each other, from what their folders hold."""
