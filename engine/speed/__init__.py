"""How fast whole training steps are: `ipfm bench --step`."""
