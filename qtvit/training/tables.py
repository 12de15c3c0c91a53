"""Sizes of the tables of classes that evaluations print."""

NAME_CHARS = 30
"""Characters of a class name in a table."""
MAX_ROWS, NUM_WORST = 20, 10
"""A table of up to MAX_ROWS classes has all of them, a larger one the NUM_WORST with the lowest scores."""
