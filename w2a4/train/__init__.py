"""Training with quantised weights, activations and KV cache in the loop."""
