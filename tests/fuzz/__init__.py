"""Seeded mutations of everything that vessel-rt reads. `python -m tests.fuzz --minutes 60` runs them; test_fuzz.py runs a few hundred."""
