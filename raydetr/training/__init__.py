"""One training run: the step, the epoch, the run with its checkpoints, TensorBoard events and progress display.

Knows nothing of ray: ``launch`` calls ``fit`` in a plain process, a Ray Train worker or a Ray Tune trial alike.
"""
