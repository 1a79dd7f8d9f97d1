"""transformers, GGUF and checkpoints on disk: where models come from and go to."""
