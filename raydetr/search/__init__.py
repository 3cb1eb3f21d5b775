"""Hyperparameter search: search spaces, the Optuna study, samplers, early stopping, population-based training, and the report of a search.

Imports neither torch nor ray. ``launch`` runs the trials of a search, and the command line shows its results.
"""
