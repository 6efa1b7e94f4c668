"""A bundle against the PyTorch reference, and FP16 ranges. Does not import the graphs that it checks."""
