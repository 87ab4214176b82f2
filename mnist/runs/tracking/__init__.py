"""What is logged where."""
