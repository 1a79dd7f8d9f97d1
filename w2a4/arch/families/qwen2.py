"""Qwen 2 and 2.5: a LLaMA with a bias on q, k and v, and windows in some layers if `use_sliding_window`.

A bias follows the rows of its linear through rotations and scaling, so the table has nothing to say of it.
"""

from ..architecture import Architecture

ARCHITECTURE = Architecture("qwen2", "Qwen2ForCausalLM")
