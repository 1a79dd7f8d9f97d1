"""Triton kernels of w2a4; imported as `w2a4.triton_kernels`."""
