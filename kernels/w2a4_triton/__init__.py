"""Triton kernels of w2a4; imported as `w2a4.triton_kernels`. Importing a module here registers its ops.

gemm        `w2a4::gemm_w4a4` and `w2a4::gemm_w2a4`, linear layers for many tokens
tiles       which tile they run with
ldp         the fake quantisation of learnable direct partitioning, forward and backward
fake_quant  that of activations and of keys and values, forward and backward
language    what the kernels share
"""
