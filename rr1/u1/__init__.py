"""Robust-U1: recover the picture first, then reason over both."""
