"""benchmarks.experiments.forms: what each form rounds to, and that all is exact again between two rows."""

import pytest
import torch

import w2a4
from benchmarks.experiments import forms
from support.tiny_models import tiny_llama, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_each_form_can_say_is_kept():
    steps = torch.arange(-7.0, 8)[None]
    assert torch.equal(forms.symmetric(steps, 1.0), steps)
    assert torch.equal(
        forms.signed(torch.arange(-7.0, 9)[None], 1.0), torch.arange(-7.0, 9)[None]
    )  # scale < 0
    assert torch.equal(forms.asymmetric(torch.arange(-3.0, 13)[None], 1.0), torch.arange(-3.0, 13)[None])
    above = torch.arange(16.0)[None]  # on one side of 0
    assert torch.equal(forms.asymmetric(above, 1.0), above) and torch.equal(
        forms.asymmetric(-above, 1.0), -above
    )


def test_a_table_is_better_than_equal_steps_for_a_gaussian():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    errors = {
        name: float((forms.best_of_clips(x, form) - x).square().mean())
        for name, form in {
            "symmetric": forms.symmetric, "signed": forms.signed, "table": forms.Table(x, False),
            "table, signed": forms.Table(x, True),
        }.items()
    }  # fmt: skip
    assert errors["table, signed"] < errors["table"] < errors["signed"] < errors["symmetric"]


def test_rows_begin_with_the_exact_model():
    model = tiny_llama(dtype=torch.float32)
    w2a4.rotate(model, w2a4.Recipe.load("w4a4kv4").rotation)
    ids, seen = tokens(model), []

    def score():
        seen.append(model(ids).logits)
        return [float(seen[-1].square().mean())]

    rows = forms.run(model, score, [16])
    assert [row["form"] for row in rows] == [
        "symmetric", "signed", "asymmetric", "table", "table, signed", "symmetric", "signed", "asymmetric"
    ]  # fmt: skip
    assert [row["bits"] for row in rows] == [5, 5, 5.25, 5, 5, 4, 4, 4]
    assert all(not torch.equal(logits, seen[0]) for logits in seen[1:])
    assert forms.run(model, score, [16], ["activations"]) == rows[5:]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, seen[0])
