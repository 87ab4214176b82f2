"""The mathematics of training: sees no files, no console, no trackers."""
