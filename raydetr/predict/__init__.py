"""A trained model in use: predictions on images with their gallery, and COCO scores of a checkpoint or a results file.

Called by the command line and the demo.
"""
