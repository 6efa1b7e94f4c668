"""Measures a loaded bundle, and describes the machine that it runs on. Does not know about runs, or who judges or compares the figures."""
