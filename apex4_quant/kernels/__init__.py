"""Arithmetic of the W4A4 format: the float64 reference and the backends. Knows nothing of models or files."""
