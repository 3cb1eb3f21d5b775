"""Converters from other annotation formats (VIA, Pascal VOC, YOLO) to COCO.

One module per format, joined by ``convert``; called by the command line and the demo.
"""
