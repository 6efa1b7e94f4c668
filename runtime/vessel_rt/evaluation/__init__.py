"""Results against ground truth. Does not know about devices or bundles, and runs no graph."""
