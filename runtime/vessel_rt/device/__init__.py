"""Devices, and graphs loaded on them. Does not know what a graph computes, nor about images."""
