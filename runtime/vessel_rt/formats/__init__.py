"""The files that a bundle consists of, declared, read and checked. Does not know about devices or images."""
