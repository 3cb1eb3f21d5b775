"""Checkpoints on disk and in the network: reading and writing them safely, downloading official ones, fitting them to a model.

Uses ``model``; called by ``training``, ``predict``, ``launch`` and ``demo``.
"""
