"""Fitting packed weights to float ones against what calibration text shows."""
