"""The machine and the other ranks."""
