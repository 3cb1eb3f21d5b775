"""One training run: the optimizer step, the epoch, the run with its checkpoints, its TensorBoard events and its progress display.

The room knows nothing of Ray: ``launch`` calls ``fit`` in a plain process, a Ray Train worker or a trial of a search alike.
"""
