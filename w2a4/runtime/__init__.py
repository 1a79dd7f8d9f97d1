"""A packed model at work: layers, KV cache, attention, the engine."""
