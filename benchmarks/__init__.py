"""Measurements, gates and everything for a lent GPU; of a clone, not of the installed package."""
