"""Processes that run sources written in Python. Nothing here imports NumPy: a worker imports what its sources need."""
