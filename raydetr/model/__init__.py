"""The DETR network: backbone, position encodings, transformer, and prediction heads.

It imports only torch, torchvision, and the settings tree; every other room may use it.
"""
