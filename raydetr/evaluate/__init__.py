"""COCO average precision of detections.

Imports neither model nor ray; called by ``training``, ``predict`` and ``demo``.
"""
