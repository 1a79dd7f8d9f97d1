"""Accuracy by recipe, on a testbed model that is trained here or on a model that is given."""
