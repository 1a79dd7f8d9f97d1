"""A step of decoding can be captured as a CUDA graph: what there is to see of that without a GPU."""

import gc

import pytest
import torch

from support.capture_lint import CaptureLint, differences, trace
from support.fake_cuda import DEVICE, fake_cuda
from support.packed import packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4 import ops
from w2a4.format import hadamard, online
from w2a4.ops import dispatch
from w2a4.runtime import engine, sequences
from w2a4.runtime.layer import packed_layers

ROWS = [prompt(tokens=n, seed=n)[0] for n in (9, 5, 12)]
NEXT = torch.tensor([3, 4, 5])
BOUND = 32

RECIPES = {
    "w2": {},
    "w4": {"weight_bits": 4},
    "w4 row": {"weight_bits": 4, "group_size": -1, "weight_method": "rtn"},
    "sinks": {"sink_tokens": 2},
    "no r3, r4": {"rotation.r3": "none", "rotation.r4": "none"},
    "random r3": {"rotation.r3": "random"},
    "signs in r3, r4": {"rotation.r3": "random_hadamard", "rotation.r4": "random_hadamard"},
}
#: Of every step of a packed model.
OPS = {"rmsnorm_a4", "attention_kv4", "linear_w8"}


@pytest.fixture
def one_by_one(monkeypatch):
    """Layers op by op, as on a CUDA device."""
    monkeypatch.setattr(ops, "has_layer_kernel", lambda x: False)


@pytest.fixture
def cuda_kernels(monkeypatch):
    """Choices as on a device with w2a4._cuda and Triton, where no tensor has an address."""
    pytest.importorskip("triton")
    assert dispatch.why_no_triton(None) is not None  # imports the kernels
    monkeypatch.setattr(dispatch, "_no_triton", {0: ""})
    monkeypatch.setattr(ops, "_cuda", True)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: id(tensor))
    caches = hadamard.had_k_matrix, online._cached_tables
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:  # of tensors without data
        cache.cache_clear()


def float_model():
    model = tiny_llama(dtype=torch.float32, vocab_size=131).eval()
    if not sequences.StaticSequences.serves(model, ROWS[:1]):
        pytest.skip("transformers 4 counts the tokens of a static cache on the host")
    return model


def linted(steps, tokens: torch.Tensor, bound: int = BOUND) -> list[str]:
    """What is wrong with a step, after the one that is done outside of the graph."""
    steps._step(tokens, bound)
    with CaptureLint() as lint:
        steps._step(tokens, bound)
    assert steps.logits.device == tokens.device
    assert "decoder_layer" not in lint.ran, "that is the way of CPUs"
    assert not isinstance(steps, sequences.PackedSequences) or lint.ran >= OPS
    return lint.found


def assert_replays(steps, tokens: torch.Tensor, bound: int = BOUND) -> None:
    captured, replayed = (trace(lambda: steps._step(tokens, bound)) for _ in range(2))
    assert captured.ops and list(differences(captured, replayed)) == []


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_step_of_a_packed_model(recipe, batch, one_by_one):
    model = packed_model(**recipe)
    with engine.inference(model):
        steps = sequences.PackedSequences(model, ROWS[:batch], 48, packed_layers(model), graphs=True)
        assert steps.graphs is not None and linted(steps, NEXT[:batch]) == []
        assert_replays(steps, NEXT[:batch])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_on_a_device_that_is_not_there(recipe, batch, cuda_kernels):
    """Copies between host and device show, and so does every choice that is made by the device."""
    model = packed_model(**recipe)
    parts = packed_layers(model)
    with fake_cuda(model), engine.inference(model):
        rows = [torch.empty(len(row), dtype=torch.long, device=DEVICE) for row in ROWS[:batch]]
        steps = sequences.PackedSequences(model, rows, 48, parts)
        assert linted(steps, torch.empty(batch, dtype=torch.long, device=DEVICE)) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("recipe", ["w2", "no r3, r4", "random r3"])
def test_a_padded_prompt(recipe, batch, one_by_one):
    model, ids, last = packed_model(**RECIPES[recipe]), prompt(batch, 32), torch.tensor([20])
    with engine.inference(model):
        steps = sequences.PackedSequences(model, [*ids], 48, packed_layers(model), graphs=True)
        steps._padded(ids, last)
        with CaptureLint() as lint:
            steps._padded(ids, last)
        assert lint.found == [] and lint.ran >= OPS and "decoder_layer" not in lint.ran
        captured, replayed = (trace(lambda: steps._padded(ids, last)) for _ in range(2))
    assert captured.ops and list(differences(captured, replayed)) == []
    captured.forget()
    replayed.forget()
    online._cached_tables.cache_clear()
    gc.collect()
    given = {ids.data_ptr(), last.data_ptr()}
    lost = [name for place, (name, kept) in captured.read.items() if kept.expired() and place not in given]
    assert lost == []


@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (1, 64), (2, 80)])
def test_a_padded_prompt_on_a_device_that_is_not_there(batch, tokens, cuda_kernels):
    model = packed_model()
    parts = packed_layers(model)
    with fake_cuda(model), engine.inference(model):
        rows = [torch.empty(9, dtype=torch.long, device=DEVICE)] * batch
        steps = sequences.PackedSequences(model, rows, 96, parts)
        ids = torch.empty(batch, tokens, dtype=torch.long, device=DEVICE)
        steps._padded(ids, steps.lengths[:1])
        with CaptureLint() as lint:
            logits = steps._padded(ids, steps.lengths[:1])
    assert lint.found == [] and "decoder_layer" not in lint.ran
    assert logits.device == DEVICE and logits.shape == steps.logits.shape


def test_a_step_of_a_float_model():
    model = float_model()
    with engine.inference(model):
        steps = sequences.StaticSequences(model, [ROWS[0]] * 2, 48)
        assert linted(steps, NEXT[:2], 48) == []
        assert_replays(steps, NEXT[:2], 48)


def test_the_float_model_on_a_device_that_is_not_there(cuda_kernels):
    model = float_model()
    with fake_cuda(model), engine.inference(model):
        rows = [torch.empty(9, dtype=torch.long, device=DEVICE)] * 2
        steps = sequences.StaticSequences(model, rows, 48)
        assert linted(steps, torch.empty(2, dtype=torch.long, device=DEVICE), 48) == []


@pytest.mark.parametrize("kind", ["packed", "float"])
def test_the_engine_brings_prompts_to_the_device(kind, cuda_kernels, monkeypatch):
    """The benches' prompts lie on the CPU."""
    model = packed_model() if kind == "packed" else float_model()
    packed_layers(model)
    with fake_cuda(model), engine.inference(model):
        steps = engine.Engine(model, 48).sequences([torch.empty(9, dtype=torch.long)], 8)
        assert steps.graphs is not None and steps.logits.device == DEVICE
        assert linted(steps, torch.empty(1, dtype=torch.long, device=DEVICE)) == []


@pytest.mark.parametrize("recipe", ["w2", "random r3", "signs in r3, r4"])
def test_what_a_graph_reads_is_kept(recipe, one_by_one):
    """Other models may push tables of rotations out of their cache while graphs still read them."""
    model = packed_model(**RECIPES[recipe])
    with engine.inference(model):
        steps = sequences.PackedSequences(model, ROWS, 48, packed_layers(model), graphs=True)
        steps._step(NEXT, BOUND)
        captured = trace(lambda: steps._step(NEXT, BOUND))
    captured.forget()
    online._cached_tables.cache_clear()
    gc.collect()
    assert [name for name, storage in captured.read.values() if storage.expired()] == []


def test_rotations_that_do_nothing_have_no_tables():
    model = packed_model(**{"rotation.r3": "random", "rotation.r4": "none"})
    layers = list(model.model.layers)
    r3 = layers[0].self_attn.kv_settings.rotation
    layers[0].mlp.down_proj.rotation = online.OnlineRotation("none", layers[0].mlp.down_proj.in_features)
    ((matrix, had_k),) = sequences._rotation_tables(layers, torch.zeros(2))
    assert matrix.shape == (r3.size, r3.size) and had_k is None


X, MASK = torch.arange(4.0), torch.tensor([True, False, True, False])
OFFENDERS = {
    "item": (lambda: X.sum().item(), "_local_scalar_dense waits for a number"),
    "float()": (lambda: float(X[0]), "_local_scalar_dense waits for a number"),
    "if": (lambda: 1 if X[0] else 0, "_local_scalar_dense waits for a number"),
    "equal": (lambda: torch.equal(X, X.clone()), "equal waits for a number"),
    "allclose": (lambda: torch.allclose(X, X), "allclose waits for a number"),
    "nonzero": (lambda: X.nonzero(), "nonzero makes as much as the data say"),
    "where": (lambda: torch.where(MASK), "nonzero makes as much as the data say"),
    "masked_select": (lambda: X.masked_select(MASK), "masked_select makes as much as the data say"),
    "mask as index": (lambda: X[MASK], "index with a mask makes as much as the data say"),
    "mask assigned to": (lambda: X.clone().__setitem__(MASK, X[:2]), "index_put_ with a mask makes as much"),
    "unique": (lambda: X.unique(), "_unique2 makes as much as the data say"),
    "repeat_interleave": (lambda: X.repeat_interleave(MASK.long()), "repeat_interleave without output_size"),
    "bincount": (lambda: MASK.long().bincount(), "bincount makes as much as the data say"),
    "tolist": (lambda: X.tolist(), "tolist reads on the host"),
    "numpy": (lambda: X.numpy(), "numpy reads on the host"),
    "cpu": (lambda: X.cpu(), "cpu reads on the host"),
    "to": (lambda: X.to("cpu"), "to('cpu') reads on the host"),
    "tensor": (lambda: torch.tensor([1, 2]), "tensor makes a tensor of host data"),
    "as_tensor": (lambda: torch.as_tensor([1, 2]), "as_tensor makes a tensor of host data"),
    "new_tensor": (lambda: X.new_tensor([1.0]), "lift_fresh makes a tensor of host data"),
}


@pytest.mark.parametrize(("offence", "message"), OFFENDERS.values(), ids=OFFENDERS)
def test_the_lint_finds(offence, message):
    with CaptureLint() as lint:
        offence()
    assert any(message in found and __file__ in found for found in lint.found), lint.found


COPIES = {
    "from the host": lambda x: torch.ones(4).to(DEVICE),
    "from the host into": lambda x: x.copy_(torch.ones(4)),
    "to the host": lambda x: x.cpu(),
    "to the host, by a device": lambda x: x.to(torch.device("cpu")),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_the_lint_finds_copies(copy):
    with fake_cuda(torch.nn.Module()):
        x = torch.empty(4, device=DEVICE)
        with CaptureLint() as lint:
            copy(x)
    assert any("copies between cpu and cuda" in found for found in lint.found), lint.found


def test_the_lint_lets_pass_what_a_graph_can_do():
    rows = torch.tensor([2, 0])
    with CaptureLint() as lint:
        y = torch.where(MASK, X, 0) * 2 + torch.zeros_like(X)
        y[rows] = X[rows]
        y.masked_fill_(MASK, 1).index_add_(0, rows, X[:2])
        torch.arange(4, device=y.device).add_(1)
    assert lint.found == []


class Places:
    """Steps that a replay would get wrong, by what is wrong."""

    def __init__(self):
        self.count, self.buffer, self.old = 0, torch.zeros(4), []

    def another_number(self):
        self.count += 1
        return self.buffer + self.count

    def another_place(self):
        self.old.append(self.buffer)
        self.buffer = self.buffer.clone() + 0
        return self.buffer * 2

    def another_shape(self):
        self.count += 1
        return self.buffer[: self.count] * 2

    def another_op(self):
        self.count += 1
        return self.buffer.exp() if self.count > 1 else self.buffer.log()

    def more_ops(self):
        self.count += 1
        return [self.buffer * 2 for _ in range(self.count)]


@pytest.mark.parametrize("step", [name for name in vars(Places) if not name.startswith("_")])
def test_the_twin_of_the_capture_finds(step):
    step = getattr(Places(), step)
    assert list(differences(trace(step), trace(step)))


def test_the_twin_of_the_capture_lets_pass():
    buffer = torch.zeros(4)

    def step():
        buffer.add_((buffer * 2).exp())
        return buffer[1:] + 1

    assert list(differences(trace(step), trace(step))) == []
