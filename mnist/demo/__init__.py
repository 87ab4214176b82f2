"""A page to draw digits on: `python -m mnist.demo`."""
