"""Benchmarks of speed and memory. Each module is a command that prints a table: ``python -m benchmarks.step``."""
