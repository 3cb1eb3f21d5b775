"""Everything that only ``raydetr demo`` needs: generated images and the pre-training of ``detr_tiny``.

Called by the command line, the tests and the benchmarks; nothing else depends on it.
"""
