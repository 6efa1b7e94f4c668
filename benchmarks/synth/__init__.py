"""A random model of the real size in the real formats, to measure and test with."""
