"""`python -m ipfm.kernels.bench`."""

from . import main

main()
