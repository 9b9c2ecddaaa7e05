"""Scaling beside the best constant number of workers, and the code that decides with a thousand workers."""
