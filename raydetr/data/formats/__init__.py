"""Converters from other annotation formats (VIA, PASCAL VOC, YOLO, COCO exports) to the COCO folder that training takes.

One module per format, joined by ``convert``; called by the command line and the demo.
"""
