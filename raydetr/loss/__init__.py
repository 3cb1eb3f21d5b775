"""Matching and losses."""
