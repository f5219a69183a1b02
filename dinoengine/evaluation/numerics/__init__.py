"""Figures of the published training beside what this installation computes; ``tools/verify_numerics.py`` prints them."""
