"""Calibration: where tokens come from, and what is collected from activations. Imports nothing of apex4."""
