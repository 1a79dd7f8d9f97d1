"""From a float model to a packed one: smooth, rotate, calibrate, fit."""
