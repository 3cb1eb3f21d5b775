"""The DETR network: backbone, position encodings, transformer and prediction heads.

Imports only torch, torchvision and the settings tree; every other room may use it.
"""
