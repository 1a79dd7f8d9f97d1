"""Rotations: construction, folding into the weights, online application, learning."""
