"""`ipfm ema`: averages of other widths, made of stored ones."""
