"""What a change of the kernels must pass: their machine code, and how full they keep a GPU."""
