"""What surrounds the steps: run directory, checkpoints, scores, records, trackers, console."""
