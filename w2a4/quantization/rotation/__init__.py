"""Rotations R1 to R4: learned, and folded into a model's weights."""
