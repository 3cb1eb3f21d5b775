"""Weights: safe reading and writing of checkpoints, official weights, and fitting them to a model with other categories.

It uses ``model``; ``training``, ``predict``, ``launch``, and ``demo`` call it.
"""
