"""`python -m ipfm.kernels.bench`."""

from ipfm.kernels.bench import main

main()
