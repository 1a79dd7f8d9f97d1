"""Triton kernels of w2a4; imported as `w2a4.triton_kernels`. Importing a module here registers its ops.

gemm        `w2a4::gemm_w4a4` and `w2a4::gemm_w2a4`, linear layers for many tokens
tiles       which tile they run with
attention   `w2a4::attention_kv4_prefill`, attention on the packed cache for many queries
ldp         2-bit weights as the nearest of the levels that their group trains, forward and backward
fake_quant  `w2a4::fake_quant_rows` on CUDA: that of activations, keys and values, forward and backward
distill     `w2a4::divergence_rows` and `w2a4::divergence_grad`, the distillation loss and its gradient
language    what the kernels share
"""
