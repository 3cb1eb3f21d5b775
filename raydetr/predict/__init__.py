"""Predictions on images: the results and their gallery, and the scores of a checkpoint or of a results file.

It uses ``training``, ``evaluate``, ``weights``, and what is below them; the commands and ``demo`` call it.
"""
