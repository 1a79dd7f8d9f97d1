"""LoRA on packed models: gradients through packed linears, and PEFT on top of them."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import w2a4
from support.packed import packed_model, prompt
from w2a4.errors import TrainingError, W2A4Error
from w2a4.format.linear import W8Linear, _PackedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "w2": {},
    "w3": {"weight_bits": 3},
    "w4": {"weight_bits": 4},
    "16-bit cache": {"kv_bits": 16},
    "no rotations": {"rotation.r3": "none", "rotation.r4": "none"},
    "sinks": {"sink_tokens": 2, "prefix_tokens": 0},
}


class Plain(nn.Module):
    """What a packed linear computes, in operations that autograd knows."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed

    def forward(self, x):
        weight = self.packed.dequantize()
        return F.linear(self.packed.seen(x).float(), weight, self.packed.bias).to(x.dtype)


class Shift(nn.Module):
    """A linear with something to learn beside it, as an adapter has."""

    def __init__(self, base):
        super().__init__()
        self.base, self.shift = base, nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x):
        return self.base(x) + self.shift


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


def test_losses_that_read_the_weight_of_the_head_get_the_weight(tmp_path):
    """As TRL's and Liger's do, which never call it."""
    plain, ids = packed_model(), prompt(2, 12)
    model = w2a4.prepare_for_adapters(packed_model())
    with torch.no_grad():
        hidden, logits = model.model(ids).last_hidden_state, model(ids).logits
    assert (hidden @ model.lm_head.weight.T - logits).abs().max() < 1e-5 * logits.abs().max()
    assert not model.lm_head.weight.requires_grad
    assert torch.equal(model.state_dict()["lm_head.weight"], plain.lm_head.weight)
    half = w2a4.prepare_for_adapters(packed_model().to(torch.bfloat16))
    assert half.lm_head.weight.dtype == half.model(ids).last_hidden_state.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("recipe", MODELS.values(), ids=MODELS)
def test_gradients_are_those_of_plain_operations(recipe):
    """Of shifts in the first and the last linear of the first layer, so that all others lie behind them."""
    model, ids = w2a4.prepare_for_adapters(packed_model(**recipe)), prompt(2, 12)
    shifts = []
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        parent, _, name = path.rpartition(".")
        parent = model.model.layers[0].get_submodule(parent)
        setattr(parent, name, Shift(parent.get_submodule(name)))
        shifts.append(parent.get_submodule(name).shift)
    other = copy.deepcopy(model)
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (_PackedLinear, W8Linear)) and not isinstance(module, Plain):
                setattr(module, name, Plain(child))
    loss_of(model, ids).backward()
    loss_of(other, ids).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    want = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert len(got) == len(shifts) and len(want) >= len(got)
    for name, grad in got.items():
        # Sums of other orders may take an activation over a border between two codes.
        torch.testing.assert_close(
            grad, want[name.replace("base", "base.packed")], rtol=0.02, atol=0.02 * float(grad.abs().max())
        )  # noqa: E501


def test_nothing_changes_but_that_linears_are_apart(tmp_path):
    model, ids = packed_model(), prompt(1, 9)
    with torch.no_grad():
        want = model(ids).logits
        state = {name: value.clone() for name, value in model.state_dict().items()}
        assert w2a4.prepare_for_adapters(model) is model and model.model.layers[0].self_attn.q_proj
        torch.testing.assert_close(model(ids).logits, want)
        assert torch.equal(w2a4.prepare_for_adapters(model)(ids).logits, model(ids).logits)  # twice
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)


def test_a_cache_under_gradients_is_refused_in_backward():
    model = w2a4.prepare_for_adapters(packed_model())
    layer = model.model.layers[0]
    layer.self_attn.q_proj = Shift(layer.self_attn.q_proj)
    cache = w2a4.KV4Cache.for_model(model)
    out = model(prompt(1, 6), past_key_values=cache)
    with pytest.raises(W2A4Error, match="use_cache=False"):
        out.logits.sum().backward()


def test_what_it_does_not_take(monkeypatch):
    from support.tiny_models import tiny_llama

    with pytest.raises(TrainingError, match="this LlamaForCausalLM is no model of w2a4"):
        w2a4.prepare_for_adapters(tiny_llama())
    replaced = tiny_llama(dtype=torch.float32)
    w2a4.replace_linears(replaced, bits=2)
    with pytest.raises(TrainingError, match="is one whose linears were replaced"):
        w2a4.prepare_for_adapters(replaced)
    from w2a4.train import adapters

    adapters._teach_peft.cache_clear()
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(TrainingError, match="pip install peft"):
        w2a4.prepare_for_adapters(packed_model())


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def with_adapters(peft, model, **options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    return peft.get_peft_model(w2a4.prepare_for_adapters(model), config)


def train(model, ids, steps=30, lr=3e-3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    model.eval()
    return losses


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("bits", [2, 4])
def test_adapters_learn_are_saved_and_loaded(bits, peft, tmp_path):
    ids = prompt(2, 16)
    base = packed_model(weight_bits=bits)
    base.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = with_adapters(peft, base)
    linears = sum(isinstance(module, _PackedLinear) for module in base.modules())
    assert linears == 14 and sum("lora_A" in name for name, _ in model.named_parameters()) == linears
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    torch.testing.assert_close(logits(model, ids), logits(packed_model(weight_bits=bits), ids))
    losses = train(model, ids)
    assert losses[-1] < 0.8 * losses[0]
    state = {name: value for name, value in base.state_dict().items() if "lora_" not in name}
    after = {name.replace(".base_layer", ""): value for name, value in state.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)

    model.save_pretrained(tmp_path / "adapter")
    again = w2a4.prepare_for_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(
        again.generate(input_ids=ids, max_new_tokens=4, do_sample=False),
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False),
    )
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(packed_model(weight_bits=bits), ids))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_merging_rounds_anew_and_unmerging_is_exact(bits, peft, tmp_path):
    ids = prompt(2, 16)
    model = with_adapters(peft, packed_model(weight_bits=bits))
    train(model, ids, lr=2e-2)
    base, wanted = logits(packed_model(weight_bits=bits), ids), logits(model, ids)
    model.merge_adapter(safe_merge=True)
    merged = logits(model, ids)
    assert (merged - wanted).square().mean() < (base - wanted).square().mean()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), wanted)
    whole = model.merge_and_unload()
    torch.testing.assert_close(logits(whole, ids), merged)
    whole.save_pretrained(tmp_path / "merged")
    assert w2a4.verify(tmp_path / "merged")["compared"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, ids), merged)


def test_trainer_of_transformers(peft, tmp_path):
    from transformers import Trainer, TrainingArguments

    packed_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, gradient_checkpointing=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in prompt(4, 12)]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=data)
    model = with_adapters(peft, model, lora_dropout=0.1)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    learned = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert learned and all(bool(p.any()) for p in learned)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save='lm_head' is packed in 8 bits"),
    ],
)
def test_kinds_of_lora_that_need_the_weight(options, message, peft):
    with pytest.raises(TrainingError, match=message):
        with_adapters(peft, packed_model(), **options)


def test_a_model_that_was_not_prepared(peft, tmp_path):
    """PEFT knows packed linears from then on, and would leave out those that are parts of a joint one."""
    model = with_adapters(peft, packed_model())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TrainingError, match="prepare_for_adapters"):
        peft.PeftModel.from_pretrained(packed_model(), tmp_path / "adapter")
    with pytest.raises(TrainingError, match="has adapters already"):
        w2a4.prepare_for_adapters(model)


def test_norms_that_are_trained_by_hand():
    model, ids = w2a4.prepare_for_adapters(packed_model()), prompt(2, 12)
    norms = {name: p.requires_grad_(True) for name, p in model.named_parameters() if "norm" in name}
    loss_of(model, ids).backward()
    assert len(norms) == 5 and all(p.grad is not None and bool(p.grad.any()) for p in norms.values())


def test_rotated_16_bit_models_merge_behind_their_rotation(peft):
    ids = prompt(2, 12)
    model = packed_model(weight_bits=16, act_bits=16, kv_bits=16)
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(w2a4.prepare_for_adapters(model), config).eval()
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), wanted, rtol=1e-3, atol=1e-3)


def test_all_linear_means_float_ones_too(peft):
    model = packed_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(176, 96, bias=False)
    model = with_adapters(peft, model)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_nothing_was_added_to_merges_to_itself(bits, peft):
    model = with_adapters(peft, packed_model(weight_bits=bits))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    model.merge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_pickling_saving_and_the_engine(peft, tmp_path):
    model, ids = with_adapters(peft, packed_model(), init_lora_weights=False).eval(), prompt(1, 9)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, ids), logits(model, ids))
    with pytest.raises(W2A4Error, match="has an adapter: save the adapters"):
        model.base_model.model.save_pretrained(tmp_path / "inner")
    new = w2a4.Engine(model, max_length=64).generate([ids[0]], 4)[0]
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, 9:], new)


def test_float_models_are_left_to_peft(peft):
    from support.tiny_models import tiny_llama

    w2a4.prepare_for_adapters(packed_model())
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
