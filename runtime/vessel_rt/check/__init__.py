"""Checks a bundle on this machine, and writes what was found to check.json and check.html. Does not know about images of users or runs."""
