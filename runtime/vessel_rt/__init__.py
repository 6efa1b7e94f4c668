"""vessel-rt: the lean runtime: a bundle and images in, masks out. Imports neither torch nor the exporter."""

__version__ = "0.1.0"
