"""Which digit a picture shows: `python -m mnist.predict`."""
