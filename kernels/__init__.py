"""Fused operators, imported as `megalite.kernels`. Nothing here imports megalite."""
