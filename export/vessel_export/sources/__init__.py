"""Checkpoint, base model and SAM2 as they come, read as data. Does not know about graphs or bundles."""
