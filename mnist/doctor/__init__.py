"""Is this machine or cluster fit to train: `python -m mnist.doctor`."""
