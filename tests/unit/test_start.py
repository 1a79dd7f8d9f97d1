"""`import w2a4` is quick, gives every public name, and makes the quantiser known to transformers."""

import ast
import os
import pickle
import subprocess
import sys

import pytest

import w2a4
from support.paths import ROOT

HEAVY = ("torch", "transformers", "numpy", "accelerate", "triton")


def python(*arguments, path=None, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT))))}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import w2a4"], ["-m", "w2a4.cli", "--help"], ["-m", "w2a4.cli", "quantize", "--help"]],
    ids=["import", "help", "help of a command"],
)
def test_nothing_heavy_is_imported(arguments):
    lines = python("-X", "importtime", *arguments).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if "|" in line}
    assert "w2a4" in imported and not imported & set(HEAVY)


def test_the_table_of_names_is_what_type_checkers_see():
    tree = ast.parse((ROOT / "w2a4" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = {
        alias.name: node.module
        for node in checked.body
        for alias in node.names
        if isinstance(node, ast.ImportFrom) and node.module
    }
    folders = {alias.name for node in checked.body if node.module is None for alias in node.names}
    assert names == w2a4._NAMES and folders == set(w2a4._FOLDERS)
    at_once = {name for name in w2a4.__all__ if name not in names}
    assert set(names) <= set(w2a4.__all__) and all(name.endswith("Error") for name in at_once)
    inner = {path.parent.name for path in (ROOT / "w2a4").glob("*/__init__.py")}
    assert folders == inner - {"cli", "triton_kernels"}


def test_public_names():
    assert set(w2a4.__all__) | set(w2a4._FOLDERS) | {"__version__"} <= set(dir(w2a4))
    for name in w2a4.__all__:
        value = getattr(w2a4, name)
        assert value.__name__ == name and getattr(w2a4, name) is value
    everything = {}
    exec("from w2a4 import *", everything)
    assert set(w2a4.__all__) <= set(everything)
    with pytest.raises(AttributeError, match="module 'w2a4' has no attribute 'quantise'"):
        w2a4.quantise  # noqa: B018
    for value in (w2a4.quantize, w2a4.Recipe.load("w2a4kv4"), w2a4.W2A4Linear):
        again = pickle.loads(pickle.dumps(value))
        assert again == value


def test_names_in_a_fresh_process():
    code = (
        "import w2a4, sys\n"
        "assert w2a4.Recipe.load('w4a4kv4').weight_bits == 4 and 'torch' not in sys.modules\n"
        "assert callable(w2a4.quantize) and callable(w2a4.ops.quantize_a4)\n"
        "import torch; assert torch.ops.w2a4.quantize_a4\n"
    )
    python("-c", code)


ORDERS = {
    "w2a4 first": "import w2a4; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import w2a4",
    "its table first": "import transformers.quantizers.auto; import w2a4",
    "a model first": "import w2a4; import transformers.models.llama.modeling_llama",
    "plug-in first": "import w2a4.hub.transformers",
}


@pytest.mark.doors
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_transformers_reads_checkpoints_in_either_order(order):
    code = (
        f"{order}\n"
        "import inspect, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.quantizers import auto\n"
        "model = AutoModelForCausalLM.from_pretrained('tests/data/format1')\n"
        "assert model.is_quantized and auto.AUTO_QUANTIZER_MAPPING['w2a4'].__name__ == 'W2A4Quantizer'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['w2a4'].__name__ == 'W2A4Config'\n"
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto) and 'plugin' not in repr(auto.__spec__)\n"
    )
    python("-c", code)


@pytest.fixture
def slow_transformers(tmp_path):
    """A folder with a package `transformers` that has the tables only, after a while."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "auto.py").write_text(
        "import time\ntime.sleep(0.2)\nAUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}\n"
        "time.sleep(0.2)\n"
    )
    return tmp_path


RACES = {
    "loading begins before": "auto.start(); wait(); w2a4.start()",
    "loading begins behind": "w2a4.start(); auto.start()",
    "many at once": "[t.start() for pair in zip(threads(load), threads(package)) for t in pair]",
}


@pytest.mark.parametrize("race", RACES.values(), ids=RACES)
def test_threads_that_import_both(slow_transformers, race):
    code = (
        "import importlib, sys, threading, time\n"
        "errors = []\n"
        "threading.excepthook = lambda arguments: errors.append(arguments)\n"
        "def load(): importlib.import_module('transformers.quantizers.auto')\n"
        "def package(): importlib.import_module('w2a4')\n"
        "def threads(what): return [threading.Thread(target=what) for _ in range(8)]\n"
        "def wait():\n"
        "    while 'transformers.quantizers.auto' not in sys.modules: time.sleep(0.01)\n"
        "auto, w2a4 = threads(load)[0], threads(package)[0]\n"
        f"{race}\n"
        "for thread in threading.enumerate():\n"
        "    if thread is not threading.main_thread(): thread.join()\n"
        "module = sys.modules['transformers.quantizers.auto']\n"
        "assert not errors, errors\n"
        "assert 'w2a4' in module.AUTO_QUANTIZER_MAPPING\n"
        "assert 'w2a4' in module.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    )
    python("-c", code, path=slow_transformers, timeout=60)


def test_a_transformers_without_the_module(tmp_path):
    (tmp_path / "transformers" / "quantizers").mkdir(parents=True)
    for folder in (tmp_path / "transformers", tmp_path / "transformers" / "quantizers"):
        (folder / "__init__.py").touch()
    code = (
        "import w2a4\n"
        "try: import transformers.quantizers.auto\n"
        "except ModuleNotFoundError as error: assert error.name == 'transformers.quantizers.auto'\n"
        "else: raise AssertionError\n"
    )
    python("-c", code, path=tmp_path)
