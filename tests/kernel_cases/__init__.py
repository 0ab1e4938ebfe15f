"""Operands, launches and comparisons of the kernels' tests: what tests/gpu does on a GPU and tests/kernels on a CPU."""
