"""Validation of a data set before training: what is wrong with the images and annotations, and what to do about it.

Called by ``raydetr data check``, by ``raydetr train`` before the first step, and by the demo.
"""
