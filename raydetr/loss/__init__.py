"""DETR's losses: matching cost, Hungarian matching, criterion.

It knows torch and the settings tree, not the network; ``training`` and ``predict`` call it.
"""
