"""A family a file, named by its `model_type`: `ARCHITECTURE` and what is special about it."""
