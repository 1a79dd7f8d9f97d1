"""Every op against its reference on calls that hypothesis draws; a call that is wrong is refused by name."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzzing import op_cases
from w2a4 import ops
from w2a4.errors import W2A4Error
from w2a4.ops import reference

if not ops.build_info().startswith("w2a4._C: CPU"):
    pytest.skip("no kernels to compare", allow_module_level=True)

SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Drawn:
    """A `Draw` that hypothesis can shrink."""

    def __init__(self, data):
        self.data = data

    def number(self, least, most):
        return self.data.draw(st.integers(least, most))

    def pick(self, options):
        return list(options)[self.data.draw(st.integers(0, len(options) - 1))]


@SETTINGS
@given(st.data())
def test_sound_calls(data):
    assert op_cases.run(op_cases.sound(Drawn(data))) == "right"


@SETTINGS
@given(st.data())
def test_hostile_calls(data):
    assert op_cases.run(op_cases.hostile(Drawn(data))).startswith(("right", "refused: "))


# Written tensors that share memory


def caches(batch=2, heads=2, capacity=4, head_dim=16):
    codes = torch.zeros(batch, heads, capacity, head_dim // 2, dtype=torch.uint8)
    return codes, torch.zeros(batch, heads, capacity, 2, dtype=torch.float16)


def rope(k_codes, k_params, v_codes, v_params):
    qkv, angles = torch.randn(2, 1, 6 * 16), torch.randn(2, 1, 16)
    return ops.rope_append_kv4(qkv, angles, angles, None, 1, k_codes, k_params, v_codes, v_params, 0, 0.9)


def test_keys_and_values_in_one_place_are_refused():
    codes, params = caches()
    with pytest.raises(RuntimeError, match="k_codes is written, but shares memory with v_codes"):
        rope(codes, params, codes, params.clone())
    with pytest.raises(RuntimeError, match="k_params is written, but shares memory with v_params"):
        rope(codes, params, codes.clone(), params)
    with pytest.raises(RuntimeError, match="codes is written, but shares memory with params"):
        ops.append_kv4(torch.randn(2, 2, 1, 2), params.view(torch.uint8)[..., :1], params, 0, 0.9)
    with pytest.raises(RuntimeError, match="k_codes is written, but shares memory with v_codes"):
        rope(codes[:, :, :3], params, codes[:, :, 1:], params.clone())
    x = torch.randn(2, 2, 2, 16)
    with pytest.raises(RuntimeError, match="codes is written, but shares memory with x"):
        ops.append_kv4(x, x.view(torch.uint8)[..., :8], params, 0, 0.9)


def test_a_cache_whose_sequences_are_one_is_refused():
    codes, params = caches(batch=1)
    with pytest.raises(RuntimeError, match="codes of shape .* some of its elements share memory"):
        ops.append_kv4(
            torch.randn(2, 2, 1, 16), codes.expand(2, -1, -1, -1), params.repeat(2, 1, 1, 1), 0, 0.9
        )


def test_caches_woven_into_each_other_are_served():
    """Keys and values side by side in one buffer, and codes beside their parameters."""
    both = torch.zeros(2, 2, 4, 2, 8 + 4, dtype=torch.uint8)
    keys, values = both[:, :, :, 0], both[:, :, :, 1]
    parts = [t for side in (keys, values) for t in (side[..., :8], side[..., 8:].view(torch.float16))]
    want = [*caches(), *caches()]
    torch.manual_seed(0)
    q = rope(*parts)
    torch.manual_seed(0)
    assert torch.equal(rope(*want), q)
    for got, expected in zip(parts, want, strict=True):
        assert torch.equal(got, expected)


# Nothing at all


def test_linears_without_inputs_outputs_or_tokens():
    bias = torch.randn(3)
    empty = ops.linear_w8(torch.zeros(2, 0), torch.zeros(3, 0, dtype=torch.int8), torch.ones(3).half(), bias)
    assert torch.equal(empty, bias.expand(2, 3))
    for tokens, out in ((0, 3), (2, 0), (1, 0), (0, 0)):
        y = ops.linear_w8(
            torch.zeros(tokens, 5), torch.zeros(out, 5, dtype=torch.int8), torch.ones(out).half()
        )
        assert y.shape == (tokens, out)
    assert ops.snap(torch.zeros(3, 2, 0), torch.zeros(3, 2, 4)).shape == (3, 2, 0)
    grads = ops.snap_backward(*[torch.zeros(3, 2, 0)] * 2, *[torch.zeros(3, 2, 4)] * 2)
    assert not grads[1].any()


def test_scaling_has_to_be_finite():
    args = [torch.randn(1, 2, 1, 16), *caches(1)[:2], *caches(1)[:2], 3, None, True, float("inf")]
    with pytest.raises(RuntimeError, match="attention_kv4: scaling=inf"):
        ops.attention_kv4(*args)


@pytest.mark.parametrize("ids", [[-1], [48], [0, 2**40]])
def test_tokens_that_an_embedding_does_not_have(ids):
    from w2a4.format.linear import W8Embedding

    table = W8Embedding.from_embedding(torch.nn.Embedding(48, 16))
    with pytest.raises(W2A4Error, match="rows 0 to 47"):
        table(torch.tensor(ids))


@pytest.mark.parametrize("start,starts", [(-1, None), (4, None), (2, [-1, 0]), (2, [0, 3])])
def test_places_outside_a_cache(start, starts):
    codes, params = caches()
    starts = None if starts is None else torch.tensor(starts)
    for append in (ops.append_kv4, reference.append_kv4):
        with pytest.raises(RuntimeError, match="start"):
            append(torch.randn(2, 2, 1, 16), codes, params, start, 0.9, starts)
        assert not codes.any() and not params.any()
