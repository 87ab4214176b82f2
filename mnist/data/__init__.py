"""Files -> images on the device -> micro-batches."""
