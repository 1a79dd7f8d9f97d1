"""`--report`: a page of tables and pictures that loads nothing from anywhere."""

import importlib.util
import sys
from html.parser import HTMLParser

import pytest
import torch

from support.commands import SMALL, fail, run, succeed
from support.families import ALL, tiny_family
from support.packed import packed_model
from w2a4.evaluate import page as pages
from w2a4.evaluate.spreads import EDGES, spreads

HEADINGS = ["What it is", "Perplexity by text", "Error by layer and linear",
            "Activations before and behind rotations", "Speed, memory and versions"]  # fmt: skip

with_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


class Seen(HTMLParser):
    """Headings, tags and everything that names another file."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.loads = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [
            v
            for k, v in attributes
            if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "h2" and data.strip():
            self.headings.append(data)
            self.tags.append("")


@with_matplotlib
def test_of_quantize_and_eval(plain, tmp_path):
    result = succeed(
        "quantize", plain, "--out", tmp_path / "q", *SMALL, "--calib", "builtin", "--eval", "builtin",
        "--eval-windows", 2, "--report", tmp_path / "q.html",
    )  # fmt: skip
    assert f"report: {tmp_path / 'q.html'}" in result.stdout
    seen = Seen((tmp_path / "q.html").read_text())
    assert seen.headings == HEADINGS and seen.tags.count("svg") == 4 and not seen.loads
    succeed("eval", tmp_path / "q", "--reference", plain, "--text", "builtin", "--seqlen", 32, "--windows", 2,
            "--report", tmp_path / "e.html")  # fmt: skip
    assert [HEADINGS[1], *HEADINGS[2:]] == Seen((tmp_path / "e.html").read_text()).headings


def test_what_is_refused(plain, tmp_path, monkeypatch):
    wrong = run("eval", plain, "--tasks", "a", "--report", tmp_path / "e.html")
    assert wrong.exit_code == 2 and "--report is of texts" in wrong.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command in (("eval", plain), ("quantize", plain, "--out", tmp_path / "q"),
                    ("train", plain, "--out", tmp_path / "t")):  # fmt: skip
        assert "pip install matplotlib" in fail(*command, "--report", tmp_path / "e.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family,case", ALL)
def test_spreads_of_a_float_model(family, case):
    found = spreads(tiny_family(family, case), torch.arange(40))
    assert len(found) == 3 * 4 and {entry["layer"] for entry in found} == {0, 1, 2}
    for entry in found:
        counts = entry["before"]["counts"]
        assert entry["behind"] is None and len(counts) == len(EDGES) - 1
        assert sum(counts) == pytest.approx(1) and entry["before"]["largest"] > 1


def test_rotations_are_undone():
    """Before and behind are one vector in two bases, and nothing of the looking stays on the model."""
    model = packed_model()
    found = {(entry["layer"], entry["site"]): entry for entry in spreads(model, torch.arange(40) % 60)}
    for (_, site), entry in found.items():
        assert entry["before"] is not None and entry["behind"] is not None, site
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.model.layers.modules()
    )
    seen = []
    norm = model.model.layers[0].input_layernorm
    hook = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.arange(40)[None] % 60)
    hook.remove()
    from w2a4.evaluate.spreads import _sides

    manifest = model.config.quantization_config.manifest
    site = model.model.layers[0].family.attention_in
    before, behind = _sides(seen[0][0], model.config, manifest, 0, site)
    from w2a4.format.online import OnlineRotation

    r1 = OnlineRotation(manifest.rotation.r1, before.shape[-1], manifest.rotation.seed, "r1")
    assert torch.allclose(r1.apply(before), behind, atol=1e-5)


@with_matplotlib
def test_numbers_that_are_missing():
    """A text of one window has no interval, and a damaged report no error of a layer."""
    measured = [
        {"text": "a", "perplexity": float("inf"), "windows": 1, "seqlen": 8, "tokens": 8, "losses": [None]}
    ]
    made = pages.report.Report(
        {}, layers=[{"name": "m.q_proj", "bits": 2, "group_size": 8, "relative_error": None}]
    )
    assert Seen(pages.page("<b>", {"m": measured}, made=made)).headings
