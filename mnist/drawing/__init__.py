"""Pictures of data, networks and runs."""
