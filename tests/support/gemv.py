"""Cases of `linear_w2a4` and `linear_w4a4`: arguments, the expected result, and its error bound."""

import numpy as np
import torch

from support.simt import load
from w2a4 import ops
from w2a4.ops import reference
from w2a4.ops.packing import pack

MOST_SHARED = 99 << 10  # bytes; the smallest of the supported GPUs


def matrix(bits, out, features, group, tokens, act_group=None):
    """Arguments of an op, random with every code and the extreme levels among them."""
    groups = features // group
    a = torch.randint(-8, 8, (tokens, features))
    w = torch.randint(0, 4, (out, features)) if bits == 2 else torch.randint(-8, 8, (out, features))
    levels = torch.randint(-128, 128, (out, groups, 4)).to(torch.int8)
    levels.view(-1, 4)[0] = torch.tensor([-128, 127, -1, 0])
    signs = torch.randint(0, 2, (out, groups)) * 2 - 1  # scales of 4-bit weights are of either
    return {
        "a_codes": pack(a, 4),
        "a_scale": torch.rand(tokens, features // (act_group or features)) + 0.1,
        "weight": pack(w, bits),
        "levels": levels if bits == 2 else None,
        "scale": (torch.rand(out, groups) + 0.1).half() * (1 if bits == 2 else signs),
        "bias": torch.randn(out),
        "group_size": group,
        "in_features": features,
    }


def expected(case, dtype=torch.float32):
    args = [case["a_codes"], case["a_scale"], case["weight"]]
    if case["levels"] is not None:
        args.append(case["levels"])
        op = reference.linear_w2a4
    else:
        op = reference.linear_w4a4
    return op(*args, case["scale"], case["bias"], case["group_size"], dtype)


def simulate(
    case,
    gemv="auto",
    arch=90,
    seed=0,
    out_dtype="float32",
    shared=MOST_SHARED,
    module=None,
    processors=1,
    residual=None,
):
    """Result and the name of the kernel that ran. Rows around the result must not be touched."""
    tokens, out = len(case["a_codes"]), len(case["weight"])
    kind = np.float32 if out_dtype == "float32" else np.uint16
    poison = np.frombuffer(b"\xab" * 4, kind)[0]
    memory = np.full((tokens + 2, out), poison)
    y = memory[1:-1]
    optional = {k: None if case[k] is None else case[k].numpy() for k in ("levels", "bias")}
    name = (module or load()).linear_a4(
        case["a_codes"].numpy(), case["a_scale"].numpy(), case["weight"].numpy(), optional["levels"],
        case["scale"].numpy().view(np.uint16), optional["bias"],
        None if residual is None else residual.view(torch.int16).numpy(), y, case["in_features"],
        case["group_size"], out_dtype, gemv, arch, processors, shared, seed,
    )  # fmt: skip
    assert (memory[0] == poison).all() and (memory[-1] == poison).all()
    result = torch.from_numpy(y.copy())
    return (result if out_dtype == "float32" else result.view(getattr(torch, out_dtype))), name


def assert_rounding(y, want, case):
    """At most one rounding of each partial sum in float32: bounded by the sum of magnitudes."""
    a = (((case["a_codes"].int()[..., None] >> torch.tensor([0, 4])) + 8) % 16 - 8).flatten(-2).abs()
    largest = case["a_scale"].max() * case["scale"].float().abs().max() * 128
    magnitude = largest * a.sum(-1, keepdim=True) + case["bias"].abs()
    terms = case["in_features"] / min(case["group_size"], 128) + 4
    assert y.isfinite().all()
    assert ((y - want).abs() <= terms * 2**-24 * magnitude).all()


SHAPES = [  # bits, out, in, group
    (2, 18, 1152, 128), (2, 33, 1024, 256), (2, 5, 640, 64), (2, 40, 288, 32), (2, 16, 640, 640),
    (2, 3, 5120, 128), (2, 7, 576, 576), (2, 9, 101, 101), (2, 9, 96, 32), (2, 4, 192, 96),
    (2, 1, 70001, 70001), (4, 17, 640, 128), (4, 33, 512, 256), (4, 5, 320, 64), (4, 40, 160, 32),
    (4, 16, 640, 640), (4, 9, 101, 101), (4, 9, 48, 48),
]  # fmt: skip


def cuda(case):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def linear(case, dtype=torch.float32):
    levels = [case["levels"]] if case["levels"] is not None else []
    op = ops.linear_w2a4 if levels else ops.linear_w4a4
    args = [case["a_codes"], case["a_scale"], case["weight"], *levels, case["scale"], case["bias"]]
    return op(*args, case["group_size"], dtype)
