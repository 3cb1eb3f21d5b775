"""Ray: training runs with Ray Train, searches with Ray Tune, and jobs on a cluster.

The only room that imports ray; called by the Python API, the command line and the demo.
"""
