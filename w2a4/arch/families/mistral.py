"""Mistral: a LLaMA whose queries may see a window of tokens only (`sliding_window`).

The cache keeps all tokens, so that a window hides some by the mask. `Engine` reads without masks, and leaves
a model to its own forward pass where the window is shorter than the sequence.
"""

from ..architecture import Architecture

ARCHITECTURE = Architecture("mistral", "MistralForCausalLM")
