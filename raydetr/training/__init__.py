"""One training run: the optimizer step, the epoch, the run with its checkpoints, its TensorBoard events and its progress display.

This room does not import Ray: ``launch`` calls ``fit`` in the same way in a plain process, a Ray Train worker or a trial of a search.
"""
