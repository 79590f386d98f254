"""What a GPU shows: tests, a memory checker, counted kernels, times. `python -m bench.gpu OUT` runs all of it.

Every step is a process of its own (processes.py), so that one that fails or hangs costs no other its results:
device_facts, sharded_tests, sanitizer, kernel_counts, timing. summary.py holds what must be reached; tables.py prints
for the README what was. By itself runs tune, which searches tiles.
"""
