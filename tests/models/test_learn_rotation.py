"""Learned rotations: the network as a function of R is exact, descent helps, resumes, and stops in time."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import w2a4
from support.learning import learn, rotations
from support.packed import SHAPE, calibration
from support.tiny_models import MODELS, decoder_linears, tiny_llama, tokens
from w2a4.errors import CalibrationError, RotationError
from w2a4.format.online import OnlineRotation
from w2a4.quantization.rotation import descent
from w2a4.quantization.rotation import fold as fuse
from w2a4.quantization.rotation import learn as lr
from w2a4.quantization.rotation import network as rn
from w2a4.quantization.rotation.cayley import orthogonality_error
from w2a4.recipe import Recipe, RotationConfig, RotationLearning

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = Recipe(weight_bits=16, act_bits=16, kv_bits=16, rotation=RotationConfig(r1="learned", r2="learned"))
#: A model whose embedding has an outlier channel and whose text it predicts well itself.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def recipe(**changes) -> Recipe:
    """4-bit weights, both rotations learned from the identity in 12 steps of 4 sequences.

    Keywords override a field; `steps`, `batch_size` and the like are those of `rotation_learning`.
    """
    learning = {f.name for f in dataclasses.fields(RotationLearning)}
    settings = {
        "rotation__r1": "learned",
        "rotation__r2": "learned",
        "init": "none",
        "steps": 12,
        "batch_size": 4,
    }
    settings = {
        f"rotation_learning.{key}" if key in learning else key.replace("__", "."): value
        for key, value in (settings | changes).items()
    }
    return Recipe(weight_bits=4, weight_method="rtn", group_size=32, act_clip=0.9).override(**settings)


def with_outliers() -> torch.nn.Module:
    model = tiny_llama(dtype=torch.float32, **WIDE)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 20
        model.lm_head.weight *= 3
    return model


@torch.no_grad()
def own_words(model, samples: int = 4, length: int = 32) -> torch.Tensor:
    """Text the model draws itself, so that quantising it costs something."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (samples, 1), generator=generator)
    for _ in range(length - 1):
        chances = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids


@pytest.fixture(scope="module")
def outliers():
    model = with_outliers()
    return model, own_words(model)


class TestNetwork:
    @pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
    def test_unquantised_it_is_the_model_for_any_rotation(self, shape):
        model = tiny_llama(**shape)
        ids, network = tokens(model), rn.RotatedNetwork(model, FULL)
        for kind in ("none", "random", "random_hadamard"):
            chosen = rotations(model, kind)
            torch.testing.assert_close(network.logits(ids, chosen), model(ids).logits, rtol=0, atol=1e-10)
            assert network.divergence(ids, chosen).abs() <= 1e-12

    def test_unquantised_its_loss_has_no_gradient_along_rotations(self):
        model = tiny_llama(**MODELS["biases"])
        network, chosen = rn.RotatedNetwork(model, FULL), rotations(model)
        loss = network.loss(tokens(model), chosen)
        gradients = torch.autograd.grad(loss, list(chosen.values()))
        for r, gradient in zip(chosen.values(), gradients, strict=True):
            along = gradient @ r.T
            assert along.abs().max() > 1e-3, "the plain gradient must not vanish, or this says nothing"
            assert (along - along.T).abs().max() <= 1e-12

    @pytest.mark.parametrize("objective", ["loss", "divergence"])
    @pytest.mark.parametrize("name", ["R1", "R2.0", "R2.1"])
    def test_the_gradient_is_exact(self, name, objective):
        """Off the rotations, where the loss does depend on R."""
        model = tiny_llama(**MODELS["odd heads"])
        network, chosen, ids = rn.RotatedNetwork(model, FULL), rotations(model), tokens(model)
        generator = torch.Generator().manual_seed(1)
        if objective == "divergence":
            # At a rotation it is least, and its gradient 0: start from elsewhere.
            off = {
                n: 0.1 * torch.randn(r.shape, generator=generator, dtype=r.dtype) for n, r in chosen.items()
            }
            chosen = {n: (r + off[n]).detach().requires_grad_() for n, r in chosen.items()}
        (gradient,) = torch.autograd.grad(getattr(network, objective)(ids, chosen), [chosen[name]])
        way = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)

        def loss(step: float) -> torch.Tensor:
            return getattr(network, objective)(ids, chosen | {name: (chosen[name] + step * way).detach()})

        numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), numeric, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize(
        "change, moved",
        [
            ({"act_bits": 4}, {"R1", "R2.0", "R2.1"}),
            # Keys and values are quantised inside a head, which R1 does not reach.
            ({"kv_bits": 4}, {"R2.0", "R2.1"}),
            ({"rotation_learning.weights": "recipe"}, {"R1", "R2.0", "R2.1"}),
        ],
    )
    def test_quantised_its_loss_depends_on_the_rotation(self, change, moved):
        model = tiny_llama(dtype=torch.float32)
        chosen = {name: r.detach().float().requires_grad_() for name, r in rotations(model).items()}
        kept = {"weight_bits": 4, "act_bits": 16, "kv_bits": 16}
        loss = rn.RotatedNetwork(model, FULL.override(**kept | change)).loss(tokens(model), chosen)
        found = set()
        for name, gradient in zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True):
            along = gradient @ chosen[name].T
            found |= {name} if (along - along.T).abs().max() > 1e-4 else set()
        assert found == moved

    def test_layers_run_again_backward_exactly(self, outliers, monkeypatch):
        model, ids = outliers
        network = rn.RotatedNetwork(model, recipe())
        gradients = []
        for again in (rn._again, lambda function, *args: function(*args)):
            monkeypatch.setattr(rn, "_again", again)
            chosen = {name: r.detach().float().requires_grad_() for name, r in rotations(model).items()}
            gradients.append(torch.autograd.grad(network.loss(ids, chosen), list(chosen.values())))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_fake_weights(self, bits):
        weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        rounded = rn._fake_weight(weight, w2a4.Recipe(weight_bits=bits, group_size=64))
        groups = rounded.detach().unflatten(1, (-1, 64))
        assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 2**bits
        error = ((rounded - weight).square().mean() / weight.square().mean()).item()
        assert error < {2: 0.16, 4: 0.02}[bits]
        (gradient,) = torch.autograd.grad(rounded.sum(), [weight])
        assert (gradient == 1).float().mean() > 0.9
        assert rn._fake_weight(weight, w2a4.Recipe(weight_bits=16, act_bits=16)) is weight

    def test_it_computes_what_the_packed_model_does(self, outliers):
        model, ids = outliers
        chosen = recipe(head_bits=16, embed_bits=16, sink_tokens=2)
        network, packed = rn.RotatedNetwork(model, chosen), copy.deepcopy(model)
        w2a4.quantize(
            packed, None, chosen.override(**{"rotation.r1": "none", "rotation.r2": "none"}), ids, False
        )
        for float_layer, layer in zip(network.base.model.layers, packed.model.layers, strict=True):
            for name, linear in decoder_linears(float_layer).items():
                linear.weight.copy_(decoder_linears(layer)[name].dequantize())
        eye = {name: r.detach().float() for name, r in rotations(model, "none").items()}
        found, full = network.loss(ids, eye).item(), loss_of(model, ids)
        assert found == pytest.approx(loss_of(packed, ids), abs=0.01)
        assert found > full + 0.2


@torch.no_grad()
def loss_of(model, ids) -> float:
    logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


class TestLearning:
    @pytest.mark.parametrize("weights", ["full", "recipe"])
    def test_loss_falls_and_so_does_the_packed_models(self, outliers, tmp_path, weights):
        # All of sixteen sequences in each step: with four, kernels equal to rounding ended 0.2 apart.
        model, ids = outliers[0], own_words(outliers[0], samples=16)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        chosen = recipe(steps=50, batch_size=16, weights=weights)
        report = learn(model, tmp_path / "r.safetensors", ids, chosen)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters()) and not model.model.layers[0].training
        assert report.after < report.before - 0.1 and report.before == report.losses[0]
        losses = {}
        for name, rotation in {
            "start": {"r1": "none", "r2": "none"},
            "learned": {"learned": str(tmp_path / "r.safetensors")},
        }.items():
            packed = copy.deepcopy(model)
            changes = {f"rotation.{key}": value for key, value in rotation.items()}
            w2a4.quantize(packed, None, chosen.override(**changes), ids, progress=False)
            losses[name] = loss_of(packed, ids)
        assert losses["learned"] < losses["start"] - 0.1

    def test_100_steps_stay_orthogonal(self, tmp_path):
        model = tiny_llama(dtype=torch.float32, num_hidden_layers=1)
        chosen = recipe(steps=100, batch_size=1, group_size=16)
        report = learn(model, tmp_path / "r.safetensors", tokens(model), chosen)
        assert len(report.losses) == len(report.orthogonality) == 100
        assert max(report.orthogonality) <= 1e-5 and max(report.final.values()) <= 1e-5

    def test_kurtosis_falls(self, outliers, tmp_path):
        model, ids = outliers
        chosen = recipe(steps=40, objective="kurtosis")
        report = learn(model, tmp_path / "r.safetensors", ids, chosen)
        assert report.after < 0.05 * report.before
        learned = load_file(tmp_path / "r.safetensors")
        sites = rn._sites(rn._fixed_part(model, chosen), chosen, ids)
        assert len(sites["R1"]) == 4 and sites["R1"][0].shape == (128, 64)
        assert len(sites["R2.1"]) == 1 and sites["R2.1"][0].shape == (128, 2, 16)
        for name, each in sites.items():
            ends = (torch.eye(len(learned[name])), learned[name])
            gaps = [[rn.kurtosis_gap((x @ r).flatten(0, -2)) for r in ends] for x in each]
            start, end = torch.tensor(gaps).mean(0)
            assert end < 0.5 * start, name

    @pytest.mark.parametrize("objective", rn.OBJECTIVES)
    def test_reproducible_from_the_seed(self, outliers, tmp_path, objective):
        model, ids = outliers
        found = []
        for run, seed in enumerate((0, 0, 1)):
            torch.manual_seed(run)
            state = torch.get_rng_state()
            out = tmp_path / f"{run}.safetensors"
            chosen = recipe(
                steps=3, init="random_hadamard", batch_size=2, rotation__seed=seed,
                objective=objective,
            )  # fmt: skip
            learn(model, out, ids, chosen, resume=False)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(load_file(out))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert all((found[0][name] - found[2][name]).abs().max() > 1e-2 for name in found[0])

    @pytest.mark.parametrize("which", ["r1", "r2"])
    def test_only_what_is_learned_moves(self, outliers, tmp_path, which):
        model, ids = outliers
        fixed = {"r1": "r2", "r2": "r1"}[which]
        chosen = recipe(**{f"rotation__{fixed}": "hadamard"})
        out = tmp_path / "r.safetensors"
        report = learn(model, out, ids, chosen)
        assert set(load_file(out)) == ({"R1"} if which == "r1" else {"R2.0", "R2.1"})
        assert report.after < report.before
        turned = fuse.rotate(copy.deepcopy(model), chosen.override(**{"rotation.learned": str(out)}).rotation)
        torch.testing.assert_close(turned(ids).logits, model(ids).logits, rtol=0, atol=1e-3)

    def test_a_recipe_that_calls_neither_learned_means_both(self, outliers, tmp_path):
        model, ids = outliers
        chosen = recipe(steps=1, rotation__r1="hadamard", rotation__r2="none")
        learn(model, tmp_path / "r.safetensors", ids, chosen)
        assert set(load_file(tmp_path / "r.safetensors")) == {"R1", "R2.0", "R2.1"}

    def test_momentum_and_schedule_act(self, outliers, tmp_path):
        model, ids = outliers
        found = {}
        for name, changes in {
            "plain": {}, "momentum": {"momentum": 0.9}, "cosine": {"schedule": "cosine"},
            "constant": {"schedule": "constant"},
        }.items():  # fmt: skip
            out = tmp_path / f"{name}.safetensors"
            learn(model, out, ids, recipe(steps=3, lr=0.05, **changes))
            found[name] = load_file(out)["R1"]
        values = list(found.values())
        assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(values) for b in values[:i])

    def test_bfloat16_models(self, tmp_path):
        model, chosen = tiny_llama(dtype=torch.bfloat16), recipe(steps=2, batch_size=2, group_size=16)
        report = learn(model, tmp_path / "r.safetensors", tokens(model), chosen)
        assert load_file(tmp_path / "r.safetensors")["R1"].dtype == torch.float32
        assert max(report.orthogonality) <= 1e-5


class TestFiles:
    def test_file_and_report(self, outliers, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        model, ids = outliers
        report = learn(model, tmp_path / "r.safetensors", ids, recipe(steps=2))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
        assert report.plot.startswith("none: matplotlib is not installed")
        assert json.loads((tmp_path / "r.json").read_text()) == dataclasses.asdict(report)
        with safe_open(tmp_path / "r.safetensors", "pt") as file:
            stored = json.loads(file.metadata()["w2a4"])
        assert lr.RotationReport(**stored["report"]) == report and len(stored["key"]) == 64
        assert report.recipe["rotation_learning"]["steps"] == 2 and report.seed == 0
        assert report.calibration == "4 x 32 tokens" and report.seconds > 0 and report.versions["torch"]
        learned = load_file(tmp_path / "r.safetensors")
        assert learned["R1"].shape == (64, 64) and learned["R2.1"].shape == (16, 16)
        assert report.final == {name: orthogonality_error(r) for name, r in learned.items()}

    def test_plot(self, outliers, tmp_path):
        pytest.importorskip("matplotlib")
        model, ids = outliers
        report = learn(model, tmp_path / "r.safetensors", ids, recipe(steps=2))
        assert report.plot == "r.png"
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

    def test_a_finished_file_is_not_learned_again_nor_overwritten(self, outliers, tmp_path, monkeypatch):
        model, ids = outliers
        out = tmp_path / "r.safetensors"
        report = learn(model, out, ids, recipe(steps=2))
        before = out.read_bytes()
        monkeypatch.setattr(descent.Descent, "run", lambda *args: pytest.fail("learned again"))
        assert learn(model, out, ids, recipe(steps=2)) == report
        # What quantising alone depends on is no matter here.
        assert learn(model, out, ids, recipe(steps=2, gptq_damp=0.1)) == report
        for other in (recipe(steps=3), recipe(steps=2, act_codes="symmetric")):
            with pytest.raises(RotationError, match="r.safetensors' exists and holds other rotations"):
                learn(model, out, ids, other)
        assert out.read_bytes() == before

    @pytest.mark.parametrize("objective", rn.OBJECTIVES)
    def test_goes_on_after_a_kill_to_the_same_rotations(self, outliers, tmp_path, monkeypatch, objective):
        model, ids = outliers
        chosen = recipe(steps=8, batch_size=2, objective=objective)
        whole = learn(model, tmp_path / "whole.safetensors", ids, chosen)
        out = tmp_path / "r.safetensors"
        step = descent.Descent._step

        def killed_at_7(self, objective):
            if len(self.losses) == 7:
                raise KeyboardInterrupt
            step(self, objective)

        monkeypatch.setattr(descent.Descent, "_step", killed_at_7)
        with pytest.raises(KeyboardInterrupt):
            learn(model, out, ids, chosen)
        monkeypatch.setattr(descent.Descent, "_step", step)
        assert {p.name for p in tmp_path.iterdir()} >= {".r.safetensors.partial"} and not out.exists()
        with pytest.raises(RotationError, match=r"\.r\.safetensors\.partial' holds .*; remove it"):
            learn(model, out, ids, recipe(steps=9, batch_size=2))
        with pytest.raises(RotationError, match="learning other rotations .*remove it"):
            learn(tiny_llama(1, dtype=torch.float32, **WIDE), out, ids, chosen)
        report = learn(model, out, ids, chosen)
        assert report.resumed_at == 5 and not (tmp_path / ".r.safetensors.partial").exists()
        assert report.losses == whole.losses and report.orthogonality == whole.orthogonality
        a, b = load_file(out), load_file(tmp_path / "whole.safetensors")
        assert all(torch.equal(a[name], b[name]) for name in b)

    def test_damaged_state(self, outliers, tmp_path):
        model, ids = outliers
        (tmp_path / ".r.safetensors.partial").write_bytes(b"not safetensors at all")
        with pytest.raises(RotationError, match="partial' cannot be read"):
            learn(model, tmp_path / "r.safetensors", ids, recipe())
        learn(model, tmp_path / "r.safetensors", ids, recipe(steps=1), resume=False)


class TestDivergence:
    """The loss, a gradient or a rotation goes wrong at step 2; what was good before is kept."""

    def run(self, tmp_path, broken, start=0):
        rotations = {
            name: torch.nn.Parameter(OnlineRotation("random", 8, 0, name).matrix(torch.float32))
            for name in ("R1", "R2.0")
        }
        seen = []

        def objective(step, rotations):
            seen.append({name: r.detach().clone() for name, r in rotations.items()})
            return broken(step, rotations) if step >= start else sum(r[0].sum() for r in rotations.values())

        options = recipe(steps=5).rotation_learning
        run = descent.Descent(rotations, options, tmp_path / "r.safetensors", None, "key")
        with pytest.raises(RotationError) as caught:
            run.run(objective)
        return str(caught.value), seen

    @pytest.mark.parametrize("value, shown", [(float("nan"), "nan"), (1e4, "1e+04")])
    def test_loss(self, tmp_path, value, shown):
        def broken(step, rotations):
            return sum(r.sum() for r in rotations.values()) * 0 + value

        message, seen = self.run(tmp_path, broken, start=2)
        assert f"failed at step 2: the loss is {shown}; least orthogonal is R" in message
        assert "those before step 1 are in" in message and "smaller rotation_learning.lr than 1.5" in message
        kept = load_file(tmp_path / "r.last-good.safetensors")
        assert all(torch.equal(kept[name], r) for name, r in seen[1].items())
        assert not (tmp_path / "r.safetensors").exists()

    def test_gradient(self, tmp_path):
        def broken(step, rotations):
            zero = rotations["R2.0"] - rotations["R2.0"].detach()
            return rotations["R1"].sum() + zero.sqrt().sum()

        message, seen = self.run(tmp_path, broken, start=2)
        assert "failed at step 2: the gradient of R2.0 is not finite; those before step 2" in message
        assert torch.equal(load_file(tmp_path / "r.last-good.safetensors")["R1"], seen[2]["R1"])

    def test_rotation(self, tmp_path, monkeypatch):
        real = descent.orthogonality_error
        count = iter(range(100))
        monkeypatch.setattr(descent, "orthogonality_error", lambda r: real(r) + (next(count) == 5) * 0.5)
        message, _ = self.run(tmp_path, None, start=9)
        assert "failed at step 2: R2.0 is not orthogonal any more: max |RᵀR - I| = 5.0e-01" in message

    def test_at_once(self, tmp_path):
        message, _ = self.run(tmp_path, lambda step, rotations: rotations["R1"].sum() * float("nan"))
        assert "failed at step 0: the loss is nan" in message and "no earlier rotations to keep" in message
        assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_too_little_text(self, tmp_path):
        model = tiny_llama(dtype=torch.float32)
        with pytest.raises(CalibrationError, match="2 windows of 11 tokens.*batch_size=4"):
            learn(model, tmp_path / "r.safetensors", tokens(model), recipe(group_size=16))
        with pytest.raises(CalibrationError, match="the model knows 0..66"):
            learn(model, tmp_path / "r.safetensors", tokens(model) + 67, recipe(group_size=16))

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"act_bits": 16, "kv_bits": 16}, "act_bits=16, kv_bits=16.*nothing is quantised"),
            ({"weight_bits": 16, "act_bits": 16, "kv_bits": 16, "weights": "recipe"},
             "nothing is quantised"),
        ],
    )  # fmt: skip
    def test_nothing_quantised(self, tmp_path, changes, message):
        with pytest.raises(RotationError, match=message):
            learn(tiny_llama(), tmp_path / "r.safetensors", calibration(), recipe(**changes))

    def test_wrong_models_and_names(self, tmp_path):
        out, model = tmp_path / "r.safetensors", tiny_llama(dtype=torch.float32)
        with pytest.raises(RotationError, match="rotation.bin.*give the name of a .safetensors file"):
            learn(model, tmp_path / "rotation.bin", tokens(model), recipe())
        with pytest.raises(RotationError, match="rotated or quantised by w2a4 already"):
            learn(w2a4.rotate(tiny_llama()), out, tokens(model), recipe())
        model.config.model_type = "mistral"
        with pytest.raises(RotationError, match="LlamaForCausalLM is not a MistralForCausalLM"):
            learn(model, out, tokens(model), recipe(batch_size=2))
        assert not list(tmp_path.iterdir())

    def test_rotating_without_a_file(self):
        with pytest.raises(RotationError, match="r1='learned'.*names no file.*learn-rotation"):
            w2a4.rotate(tiny_llama(), RotationConfig(r1="learned"))

    def test_rotations_of_another_model(self, outliers, tmp_path):
        model, ids = outliers
        out = tmp_path / "r.safetensors"
        learn(model, out, ids, recipe(steps=1))
        config = RotationConfig(r1="learned", r2="learned", learned=str(out))
        with pytest.raises(RotationError, match="R1 .*learned on this model"):
            w2a4.rotate(tiny_llama(), config)
        same, other = copy.deepcopy(model), copy.deepcopy(model)
        w2a4.rotate(same.to(torch.float16), config)  # the model itself, in another dtype
        other.model.embed_tokens.weight.data.neg_()
        with pytest.raises(RotationError, match="a model with other weights than this one"):
            w2a4.rotate(other, config)


class TestQuantize:
    recipe = Recipe.load("w4a4kv4").override(
        **{
            "rotation.r1": "learned", "rotation.r2": "learned", "rotation_learning.steps": 2,
            "rotation_learning.seqlen": 32,
        }
    )  # fmt: skip

    def model(self):
        return tiny_llama(dtype=torch.float32, **SHAPE)

    def test_learns_first(self):
        model = self.model()
        w2a4.quantize(model, None, self.recipe, calibration(), progress=False)
        rotation = Recipe.from_dict(model.config.quantization_config.recipe).rotation
        assert (rotation.r1, rotation.r2, rotation.learned) == ("learned", "learned", "rotation.safetensors")
        with torch.inference_mode():
            logits = model(calibration(2, 9)).logits
        assert logits.isfinite().all() and logits.std() > 0.1

    def test_keeps_what_was_learned_for_a_second_run(self, tmp_path, monkeypatch):
        plain = self.model()
        w2a4.quantize(plain, None, self.recipe, calibration(), progress=False)
        arguments = dict(calibration=calibration(), progress=False, resume=tmp_path / "partial")
        monkeypatch.setattr(w2a4.quantization.job.LayerQuantizer, "run", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            w2a4.quantize(self.model(), None, self.recipe, **arguments)
        monkeypatch.undo()
        assert (tmp_path / "partial" / "rotation.safetensors").is_file()
        monkeypatch.setattr(descent.Descent, "run", lambda *args: pytest.fail("learned again"))
        model = self.model()
        w2a4.quantize(model, None, self.recipe, **arguments)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(a, b)
