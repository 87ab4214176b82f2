"""Pictures of data, networks and runs: `python -m mnist.plots`, and what a finished run draws."""
