"""Robust-R1 from scratch: the method of the paper, one equation to a function."""
