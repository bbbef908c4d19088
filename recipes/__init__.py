"""One file a dataset: a base configuration and its variants."""

if __name__ == "recipes":  # python -m recipes.digits_ipfm, in the checkout
    from recipes import ipfm  # noqa: F401
