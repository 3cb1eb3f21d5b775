"""Everything that only ``raydetr demo`` needs: generated images and the pre-training of ``detr_tiny``.

The command line, the tests, the benchmarks and the examples use it; no other room may.
"""
