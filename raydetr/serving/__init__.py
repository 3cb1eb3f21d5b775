"""Predictions over HTTP: uploads and their limits, batches, the web application and its page, without Ray.

Called by ``launch/serve.py``, which puts the parts into the processes of Ray Serve.
"""
