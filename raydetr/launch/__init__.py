"""The only rooms that import ray."""
