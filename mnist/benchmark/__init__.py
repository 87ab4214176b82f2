"""The loops that others write, and contests between them and ours."""
