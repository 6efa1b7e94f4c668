"""A run: what is left to do, the workers that do it, and the journal. Does not know about ground truth or the command line."""
