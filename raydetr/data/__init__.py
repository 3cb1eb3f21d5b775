"""Images and annotations: the COCO data set, decoding, transforms and the cache of decoded images.

Imports no model, no loss and no ray; ``data.formats`` converts other annotation formats and ``data.check`` validates a data set.
"""
