"""`python -m ipfm`: the `ipfm` command where its script is not on the path.

It is installed as `ipfm.__main__`, beside the packages; `ipfm` itself is none.
"""

from ipfm.engine.commands.main import main

if __name__ == "__main__":
    main()
