"""Hyperparameter search: search spaces, the Optuna study, samplers, early stopping, populations, importances, and lists of runs.

Imports neither torch nor ray. ``launch`` runs the trials of a search, and the command line shows its results.
"""
