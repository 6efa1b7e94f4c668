"""Compares bundles, devices and batch sizes on this machine, and machines with each other. Does not know about runs and their folders."""
