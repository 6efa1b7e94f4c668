"""Measurements: each module is a command, prints what it measures and ends with one line of JSON, also kept under results/."""
