"""Trained models in other formats: ONNX, transformers, the official DETR's checkpoint, safetensors and TorchScript.

Uses ``predict``, ``weights`` and ``model``; called by the command line and the Python API.
"""
