"""What tests on a CUDA device need to be there."""

import pytest
import torch

from w2a4 import ops


@pytest.fixture
def cuda_kernels():
    """Fails where the CUDA extension is missing: a skip would pass for a run of it."""
    if not ops.has_cuda_kernels(torch.device("cuda")):
        pytest.fail(f"w2a4._cuda is not loaded: {ops.build_info()}")
