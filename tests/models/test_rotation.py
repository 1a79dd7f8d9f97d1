"""Rotations leave a LLaMA's output unchanged, and what they cannot handle fails loudly."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import w2a4
from support.tiny_models import MODELS, tiny_llama, tokens
from w2a4.errors import CheckpointError, RecipeError, RotationError
from w2a4.format.online import OnlineRotation, RotatedLinear
from w2a4.quantization.rotation.fold import rotate
from w2a4.recipe import RotationConfig

pytestmark = pytest.mark.usefixtures("one_thread")
NONE = {"r1": "none", "r2": "none", "r3": "none", "r4": "none"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(model)).logits


def relative_change(model: LlamaForCausalLM, config: RotationConfig) -> float:
    before = logits(model)
    assert rotate(model, config) is model
    return ((logits(model) - before).abs().max() / before.abs().max()).item()


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request) -> LlamaForCausalLM:
    return tiny_llama(**MODELS[request.param])


def test_the_tiny_models_are_hard_enough():
    model = tiny_llama(**MODELS["odd heads"])
    assert (model.model.norm.weight - 1).abs().min() > 0.01
    assert model.model.embed_tokens.weight.mean(-1).abs().min() > 1e-3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.o_proj.in_features == 24 != model.config.hidden_size
    # Float64 throughout: a change in the last places of an embedding shows in the logits.
    before = logits(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1 + 1e-12)
    assert 0 < (logits(model) - before).abs().max() < 1e-9


def test_norm_fusion(model):
    assert relative_change(model, RotationConfig(**NONE)) <= 1e-12
    norms = [m for n, m in model.named_modules() if "norm" in n]
    assert len(norms) == 5 and all((norm.weight == 1).all() for norm in norms)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "random"])
@pytest.mark.parametrize("which", ["r1", "r2", "r4"])
def test_each_rotation_alone(model, which, kind):
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert relative_change(model, RotationConfig(**NONE | {which: kind})) <= 1e-10
    turned = {"r1": "embed_tokens", "r2": "layers.1.self_attn.o_proj", "r4": "layers.1.mlp.down_proj"}[which]
    name = f"model.{turned}.weight"
    assert (dict(model.named_parameters())[name] - weights[name]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "random"])
def test_all_rotations_together(model, kind):
    assert relative_change(model, RotationConfig(r1=kind, r2=kind, r3=kind, r4=kind, seed=5)) <= 1e-10


def test_r4_in_blocks(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    before = logits(model)
    w2a4.rotate(model, RotationConfig(**NONE | {"r4": "hadamard"}, r4_blocks=2, seed=3))
    assert model.config.quantization_config.rotated_by["rotation"]["r4_blocks"] == 2
    rotation = model.model.layers[0].mlp.down_proj.rotation
    assert (rotation.block_size, rotation.k) == (24, 12)  # of 48 inputs
    assert rotation.matrix()[:24, 24:].abs().max() == 0
    assert (logits(model) - before).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "m")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for wrong in ({"block_size": 8, "k": 4}, {"block_size": 24, "k": 24}):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["manifest"]["r4"] |= wrong
        (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError):
            LlamaForCausalLM.from_pretrained(tmp_path / "m")


def test_r4_blocks_that_cannot_be():
    with pytest.raises(RotationError, match="r4: 5 equal blocks do not make up a width of 48"):
        rotate(tiny_llama(), RotationConfig(r4_blocks=5))
    for kind in ("random", "random_hadamard", "none"):
        with pytest.raises(RecipeError, match=f"r4_blocks=2 with rotation.r4='{kind}'"):
            RotationConfig(r4=kind, r4_blocks=2)
    with pytest.raises(RecipeError, match="rotation.r4_blocks=0: give a number >= 1"):
        RotationConfig(r4_blocks=0)


def test_rotations_one_after_another_add_up():
    """R1, then R1 + R2, then R1 + R2 + R4 on copies: each the same function."""
    steps = [{}, {"r1": "random"}, {"r2": "random"}, {"r4": "random"}]
    config, original = dict(NONE), tiny_llama(**MODELS["odd heads"])
    for step in steps:
        config |= step
        assert relative_change(copy.deepcopy(original), RotationConfig(**config)) <= 1e-10


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "random"])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_r3_leaves_scores_unchanged(kind, head_dim):
    rotation = OnlineRotation(kind, head_dim, 3, "r3")
    q, k = torch.randn(2, 2, 5, 7, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = rotation.apply(q) @ rotation.apply(k).mT
    torch.testing.assert_close(rotated, q @ k.mT, rtol=0, atol=1e-13)
    assert (rotation.apply(k) - k).abs().max() > 0.1


def test_weights_are_cast_once():
    """In float32, the rotated weights are the float64 ones rounded, not products of rounded factors."""
    exact, single = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), single.parameters(), strict=True):
            p.copy_(q)
    for model in (exact, single):
        rotate(model, RotationConfig(r1="random", r2="random", r4="random"))
    for (name, p), q in zip(exact.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(p.float(), q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_stay_close(dtype):
    model = tiny_llama(dtype=dtype)
    reference = tiny_llama(dtype=torch.float64)
    before = (logits(model).double() - logits(reference)).abs().max()
    rotate(model, RotationConfig())
    assert all(p.dtype == dtype for p in model.parameters())
    assert (logits(model).double() - logits(reference)).abs().max() <= 4 * before


def test_generation_with_a_cache_is_unchanged():
    model = tiny_llama(**MODELS["odd heads"])
    args = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens(model), **args)
    rotate(model, RotationConfig())
    assert torch.equal(model.generate(tokens(model), **args), before)


def test_tied_embeddings_stay_untied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    rotate(model, RotationConfig(**NONE))
    model.tie_weights()
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert head is not embed and (head - embed).abs().max() > 0.1
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.lm_head.weight, head) and torch.equal(loaded.model.embed_tokens.weight, embed)


def test_config_records_everything(tmp_path):
    model = tiny_llama()
    config = RotationConfig(r3="random_hadamard", r4="random_hadamard", seed=11)
    rotate(model, config)
    model.config.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["w2a4_rotation"]
    online = {name: OnlineRotation.from_dict(data) for name, data in record.pop("online").items()}
    assert RotationConfig(**record) == config
    assert online["r3"] == OnlineRotation("random_hadamard", 8, 11, "r3")
    assert online["r4"] == model.model.layers[1].mlp.down_proj.rotation
    assert (online["r4"].block_size, online["r4"].k) == (48, 12)


def test_rotated_linear():
    rotation = OnlineRotation("random_hadamard", 12, 0, "r4")
    plain = nn.Linear(12, 5).double().eval().requires_grad_(False)
    weight = plain.weight.clone()
    x = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    plain.weight.copy_(weight @ rotation.matrix())
    layer = RotatedLinear.from_linear(plain, rotation)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert not layer.training and not layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert "random_hadamard" in repr(layer) and isinstance(layer, nn.Linear)
    fresh = RotatedLinear(12, 5, bias=False, rotation=rotation, dtype=torch.float16)
    assert fresh.bias is None and fresh.weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["none", "hadamard", "random_hadamard", "random"])
@pytest.mark.parametrize("size", [1, 12, 64])
class TestOnlineRotation:
    def test_apply_is_the_matrix_and_orthogonal(self, kind, size):
        rotation = OnlineRotation(kind, size, 2, "r4")
        r = rotation.matrix()
        assert r.dtype == torch.float64
        x = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(rotation.apply(x), x @ r, rtol=0, atol=1e-13)
        torch.testing.assert_close(r.T @ r, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
        half = rotation.apply(x.half())
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.double(), x @ r, rtol=0, atol=1e-2)
        assert rotation.apply(x[:0]).shape == x[:0].shape

    def test_survives_json(self, kind, size):
        rotation = OnlineRotation(kind, size, 7, "r3")
        again = OnlineRotation.from_dict(json.loads(json.dumps(rotation.to_dict())))
        assert again == rotation and hash(again) == hash(rotation)

    def test_gradient(self, kind, size):
        x = torch.randn(
            1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        assert torch.autograd.gradcheck(OnlineRotation(kind, size, 2, "r4").apply, x)

    def test_compiles_in_one_graph(self, kind, size):
        torch.compiler.reset()
        rotation = OnlineRotation(kind, size, 2, "r4")
        x = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(lambda x: rotation.apply(x) * 2, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), rotation.apply(x) * 2)


def test_random_rotations_depend_on_the_seed_and_name_only():
    draws = {}
    for kind in ("random_hadamard", "random"):
        for name in ("r1", "r4", "r2.0", "r2.1"):
            for seed in (0, 1):
                draws[kind, name, seed] = OnlineRotation(kind, 24, seed, name).matrix()
    matrices = list(draws.values())
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(matrices) for b in matrices[:i])
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for (kind, name, seed), matrix in draws.items():
        assert torch.equal(OnlineRotation(kind, 24, seed, name).matrix(), matrix)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_rotations_never_change():
    """A checkpoint stores the seed: the same numbers must come out of it forever."""
    signs = OnlineRotation("random_hadamard", 16, 0, "r4").matrix()[:, 0].sign().int().tolist()
    assert signs == [1, 1, 1, 1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, 1, 1]
    row = OnlineRotation("random", 3, 0, "r4").matrix()[0]
    expected = torch.tensor([-0.298749766082854, 0.529222347102151, 0.794148779885187], dtype=torch.float64)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


def test_rotate_is_reproducible_and_leaves_the_global_generator_alone():
    results = []
    for global_seed in (0, 999):
        model = tiny_llama()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        rotate(model, RotationConfig(r1="random", r2="random_hadamard", r4="random", seed=4))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    other = rotate(tiny_llama(), RotationConfig(r1="random", r2="random_hadamard", r4="random", seed=5))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (other.state_dict()[name] - results[0][name]).abs().max() > 1e-2


def test_layers_have_different_r2():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.copy_(model.model.layers[0].self_attn.v_proj.weight)
            layer.input_layernorm.weight.fill_(1)
    rotate(model, RotationConfig(**NONE | {"r2": "random_hadamard"}))
    first, second = (layer.self_attn.v_proj.weight for layer in model.model.layers)
    assert (first - second).abs().max() > 1e-2


class TestLearned:
    def write(self, path, model, drop=(), **changes):
        """A file of random rotations in float32, as learning leaves them."""
        config = model.config
        sizes = {"R1": config.hidden_size} | {f"R2.{i}": 8 for i in range(config.num_hidden_layers)}
        tensors = {
            name: OnlineRotation("random", n, 1, name).matrix(torch.float32) for name, n in sizes.items()
        }
        tensors = {name: tensor for name, tensor in (tensors | changes).items() if name not in drop}
        save_file(tensors, path)
        return RotationConfig(**NONE | {"r1": "learned", "r2": "learned", "learned": str(path)})

    def test_output_unchanged_though_the_file_is_rounded(self, tmp_path):
        model = tiny_llama()
        assert relative_change(model, self.write(tmp_path / "r.safetensors", model)) <= 1e-10

    def test_is_the_rotation_of_the_file(self, tmp_path):
        model = tiny_llama()
        embed = model.model.embed_tokens.weight.detach().clone()
        config = self.write(tmp_path / "r.safetensors", model)
        rotate(model, config)
        r1 = load_file(config.learned)["R1"].double()
        torch.testing.assert_close(model.model.embed_tokens.weight.detach(), embed @ r1, rtol=0, atol=1e-5)

    def test_a_file_of_spinquant(self, tmp_path):
        """`R.bin`, a dict that torch.save wrote; the model is turned as by our own file of these matrices."""
        model, other = tiny_llama(), tiny_llama()
        config = self.write(tmp_path / "r.safetensors", model)
        tensors = load_file(config.learned)
        theirs = {f"model.layers.{i}.self_attn.R2": tensors[f"R2.{i}"] for i in range(2)} | {
            "R1": tensors["R1"]
        }
        torch.save(theirs, tmp_path / "R.bin")
        rotate(model, config)
        rotate(other, dataclasses.replace(config, learned=str(tmp_path / "R.bin")))
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    @pytest.mark.parametrize(
        "content", [{"R1": [1.0]}, {0: torch.eye(2)}, [torch.eye(2)], b"nothing", b"hello", b"R", print]
    )
    def test_pickles_that_hold_no_rotations(self, content, tmp_path):
        model = tiny_llama()
        config = dataclasses.replace(self.write(tmp_path / "r", model), learned=str(tmp_path / "R.bin"))
        if isinstance(content, bytes):
            (tmp_path / "R.bin").write_bytes(content)
        else:
            torch.save(content, tmp_path / "R.bin")
        assert_fails_untouched(model, r"R.bin' is not a dict of tensors", config)

    def test_only_r2_learned_needs_only_r2(self, tmp_path):
        model = tiny_llama()
        path = tmp_path / "r.safetensors"
        self.write(path, model, drop=["R1"])
        config = RotationConfig(r1="hadamard", r2="learned", learned=str(path))
        assert relative_change(model, config) <= 1e-10

    @pytest.mark.parametrize(
        "drop, changes, message",
        [
            (["R2.1"], {}, r"lacks 'R2.1'.*2 layers"),
            ([], {"R2.2": torch.eye(8)}, r"has 'R2.2'.*2 layers"),
            ([], {"R1": torch.eye(16)}, r"R1 .*\(16, 16\).*\(32, 32\)"),
            ([], {"R2.0": torch.eye(8) * 1.01}, r"R2.0 .*not orthogonal.*0.0201"),
            ([], {"R1": torch.full((32, 32), float("nan"))}, r"R1 .*not orthogonal.*nan"),
        ],
    )
    def test_wrong_files(self, tmp_path, drop, changes, message):
        model = tiny_llama()
        config = self.write(tmp_path / "r.safetensors", model, drop, **changes)
        assert_fails_untouched(model, message, config)

    def test_missing_and_damaged_files(self, tmp_path):
        model = tiny_llama()
        config = self.write(tmp_path / "r.safetensors", model)
        (tmp_path / "r.safetensors").write_bytes(b"not safetensors at all")
        assert_fails_untouched(model, "r.safetensors' is not a safetensors file", config)
        (tmp_path / "r.safetensors").unlink()
        assert_fails_untouched(model, "r.safetensors' does not exist", config)


def assert_fails_untouched(model: nn.Module, message: str, config: RotationConfig | None = None) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(RotationError, match=message):
        rotate(model, config or RotationConfig())
    for name, p in model.state_dict().items():
        assert p.is_meta or torch.equal(p, before[name]) or p.isnan().any(), name


class TestFailsLoudly:
    def test_twice(self):
        model = rotate(tiny_llama(), RotationConfig(**NONE))
        assert_fails_untouched(model, "rotated already.*original weights")

    def test_other_architectures(self):
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        assert_fails_untouched(GPT2LMHeadModel(config), "'gpt2'.*LayerNorms.*reads llama, mistral")
        assert_fails_untouched(nn.Linear(2, 2), "type 'None'")

    def test_bare_decoder(self):
        assert_fails_untouched(tiny_llama().model, "LlamaModel is not shaped like LlamaForCausalLM")

    def test_adapter_around_a_linear(self):
        class Lora(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base_layer, self.lora_a = base, nn.Parameter(torch.zeros(2, 32))

        model = tiny_llama()
        attention = model.model.layers[1].self_attn
        attention.q_proj = Lora(attention.q_proj)
        assert_fails_untouched(
            model, r"layers\.1\.self_attn\.q_proj is a Lora.*not a floating-point nn.Linear"
        )

    def test_quantised_linear(self):
        class Linear4bit(nn.Linear):
            pass

        model = tiny_llama()
        model.model.layers[0].mlp.up_proj = Linear4bit(32, 48, bias=False)
        assert_fails_untouched(model, r"layers\.0\.mlp\.up_proj is a Linear4bit")
        model = tiny_llama()
        up_proj = model.model.layers[0].mlp.up_proj
        up_proj.weight = nn.Parameter(up_proj.weight.detach().to(torch.int8), requires_grad=False)
        assert_fails_untouched(model, r"up_proj is a Linear of torch.int8")

    def test_extra_consumer_of_the_residual_stream(self):
        model = tiny_llama()
        model.value_head = nn.Linear(32, 1)
        assert_fails_untouched(model, "value_head.weight is not part of a plain LlamaForCausalLM")
        model = tiny_llama()
        model.model.layers[0].register_buffer("steering", torch.zeros(32))
        assert_fails_untouched(model, "layers.0.steering is not part")

    def test_weights_shared_between_layers(self):
        model = tiny_llama()
        first, second = model.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        assert_fails_untouched(model, "up_proj.weight shares its memory")

    def test_nan_weight(self):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight[3, 4] = float("nan")
        assert_fails_untouched(model, r"layers\.1\.self_attn\.k_proj\.weight holds NaN")

    def test_meta_weight(self):
        model = tiny_llama()
        model.model.layers[0].mlp.gate_proj.to("meta")
        assert_fails_untouched(model, r"gate_proj\.weight is on the meta device")

    def test_head_dim_that_does_not_fit(self):
        model = tiny_llama()
        model.config.head_dim = 5
        assert_fails_untouched(model, r"q_proj has the shape \(32, 32\).*\(20, 32\); correct config.head_dim")

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"kind": "hadamar"}, "kind='hadamar'"),
            ({"size": 0}, "size=0"),
            ({"k": 5}, "k=5"),
            ({"block_size": 9}, "block_size=9"),
            ({"seed": "0"}, "'seed' is missing, unknown or mistyped"),
            ({"extra": 1}, "'extra' is missing, unknown or mistyped"),
        ],
    )
    def test_damaged_online_rotation(self, change, message):
        with pytest.raises(RotationError, match=message):
            OnlineRotation.from_dict(OnlineRotation("hadamard", 24, 0, "r4").to_dict() | change)

    def test_activation_of_another_width(self):
        with pytest.raises(RotationError, match=r"\(2, 11\).*r4 of width 12"):
            OnlineRotation("none", 12, 0, "r4").apply(torch.zeros(2, 11))


def test_unquantised_loss_does_not_depend_on_the_rotation():
    """The Riemannian gradient of the loss on R1 is 0: its skew part, for R free in the weights."""
    model = rotate(tiny_llama(**MODELS["biases"]), RotationConfig(**NONE))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    r1 = OnlineRotation("random", 32, 0, "r1").matrix().requires_grad_()
    r2 = OnlineRotation("random", 8, 0, "r2.0").matrix().requires_grad_()
    ids = tokens(model)

    def turn(name: str, p: torch.Tensor) -> torch.Tensor:
        heads = torch.block_diag(*[r2] * (p.shape[0 if "v_proj" in name else -1] // 8))
        if "norm" in name:
            return p
        if "v_proj" in name:
            p = heads.T @ p
        if "o_proj.weight" in name:
            p = p @ heads
        if "o_proj" in name or "down_proj" in name:
            return r1.T @ p
        return p @ r1 if name.endswith("weight") else p

    out = functional_call(model, {name: turn(name, p) for name, p in weights.items()}, (ids,)).logits
    torch.testing.assert_close(out, logits(model), rtol=0, atol=1e-10)
    loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for rotation, gradient in zip((r1, r2), torch.autograd.grad(loss, (r1, r2)), strict=True):
        along = gradient @ rotation.T
        assert along.abs().max() > 1e-3, "the plain gradient must not vanish, or this says nothing"
        assert (along - along.T).abs().max() <= 1e-12
