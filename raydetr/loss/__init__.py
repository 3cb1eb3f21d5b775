"""The set-prediction loss: Hungarian matching, the criterion and box operations.

Imports only torch, scipy and the settings tree; called by ``training`` and ``predict``.
"""
