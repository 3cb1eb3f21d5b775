"""Data sets: read, converted, checked, transformed, generated."""
