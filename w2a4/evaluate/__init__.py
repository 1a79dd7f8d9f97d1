"""Perplexity, text, reports."""
