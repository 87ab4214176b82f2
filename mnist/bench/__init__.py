"""This project's loop against the usual loops: `python -m mnist.bench`."""
