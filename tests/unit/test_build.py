"""What was built and how it is laid out; real installations are too slow for a test."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("w2a4_build", ROOT / "build_backend/w2a4_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_torch(tmp_path, monkeypatch):
    """Makes a site-packages folder with a torch of this version, and the only one that is searched."""

    def make(version):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
        monkeypatch.setenv("W2A4_TORCH", str(tmp_path))

    return make


def extension_path():
    path = next((ROOT / "w2a4").glob("_C*.so"), None)
    if path is None:
        pytest.skip("w2a4._C is not built in place")
    return path


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"
    assert (ROOT / "kernels/w2a4_triton/__init__.py").exists()


def test_transformers_imports_from_the_repo_root():
    code = "import transformers.models.llama.modeling_llama as m; print(m.LlamaForCausalLM.__name__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "LlamaForCausalLM" in run.stdout, run.stderr


def test_extension_needs_no_private_torch_symbol():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    path = extension_path()
    symbols = subprocess.run(["nm", "-D", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r"^\s+U (.+)$", symbols, re.MULTILINE)
    private = [name for name in undefined if re.search(r"\b(c10|at|torch)::", name)]
    assert not private, f"not of the stable ABI: {private}"
    defined = re.findall(r"^[0-9a-f]+ T (.+)$", symbols, re.MULTILINE)
    assert defined == ["PyInit__C"], "only the module's entry point may be exported"
    assert path.name == "_C.abi3.so"


def test_build_info_is_one_line_that_says_why_there_is_no_cuda():
    from w2a4 import ops

    assert "\n" not in ops.build_info() and ops.build_info().startswith("w2a4._C: ")
    assert re.search(r"w2a4\._cuda: (not loaded \(.+\)|CUDA kernels)", ops.build_info())


def test_wheel_and_source_archive_carry_the_data(tmp_path):
    """What the package reads beside its modules: the recipes and the general text."""
    data = {
        "w2a4/evaluate/text/general.jsonl.bz2",
        "w2a4/evaluate/text/README.md",
        "w2a4/recipe/w2a4kv4.yaml",
    }
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "*.so", "triton_kernels")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=ignored)
    for command in (["build_py", "-d", str(tmp_path / "lib")], ["egg_info", "-e", str(tmp_path)]):
        run = subprocess.run(
            [sys.executable, "setup.py", "-q", *command], cwd=source, capture_output=True, text=True,
            env=os.environ | {"W2A4_BUILD_EXT": "0"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert all((tmp_path / "lib" / name).is_file() for name in data)
    listed = (tmp_path / "w2a4.egg-info/SOURCES.txt").read_text().splitlines()
    assert data <= set(listed)


def test_a_source_tree_that_is_not_installed_is_usable(tmp_path):
    """As after `build_ext --inplace`: the package has no metadata, and Triton kernels lie elsewhere."""
    for folder in ("w2a4", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, w2a4; from w2a4.ops import dispatch; print(w2a4.__file__, w2a4.__version__);"
        "print(dispatch.why_no_triton(None) or 'triton', 'w2a4.triton_kernels.gemm' in sys.modules)"
    )
    # No site-packages of an editable install may lend its finder: only the folders of the others.
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *others]), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    imported, kernels = run.stdout.splitlines()
    path, version = imported.split()
    assert path == str(tmp_path / "w2a4/__init__.py") and re.match(r"\d+\.\d+", version)
    missing = "triton is not installed, `pip install triton` False"
    assert kernels == ("triton True" if importlib.util.find_spec("triton") else missing)


def test_a_slow_path_warns_once(monkeypatch):
    from w2a4.ops import library

    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr(library, "cuda_module", None)
    with pytest.warns(UserWarning, match="CUDA kernels are not loaded .*W2A4_BUILD_CUDA=1 pip install"):
        library._warn_slow("hadamard", "cuda")
    with pytest.warns(UserWarning, match="no kernels for 'mps'"):
        library._warn_slow("hadamard", "mps")
    monkeypatch.setattr(library, "cuda_module", object())
    with pytest.warns(UserWarning, match="w2a4.round_columns has no cuda kernel"):
        library._warn_slow("round_columns", "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library._warn_slow("round_columns", "cuda")
        library._warn_slow("quantize_a4", "mps")


@pytest.fixture
def cuda_build(monkeypatch, tmp_path):
    """build_backend/w2a4_cuda.py, with a torch of CUDA 13 and an nvcc that knows three architectures."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import w2a4_cuda

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\nif [ $1 = --version ]; then echo 'release 13.0, V13'; "
        "else printf 'compute_75\\ncompute_80\\ncompute_90\\n'; fi\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("W2A4_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(w2a4_cuda, "_archs_here", list)
    return w2a4_cuda, tmp_path / "torch"


def test_cuda_is_built_where_torch_has_it_and_nvcc_is_there(cuda_build, monkeypatch):
    module, torch = cuda_build
    nvcc, _ = module.choose_cuda(torch)
    assert (nvcc.version, nvcc.archs, nvcc.ptx) == ("13.0", (80, 90), 90)
    assert nvcc.names() == "sm_80 sm_90 compute_90"
    monkeypatch.setenv("W2A4_BUILD_CUDA", "0")
    assert module.choose_cuda(torch) == (None, "W2A4_BUILD_CUDA=0")
    monkeypatch.setenv("W2A4_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="W2A4_BUILD_CUDA='yes'; give 0 or 1"):
        module.choose_cuda(torch)


def test_cuda_is_left_out_with_a_reason(cuda_build, monkeypatch):
    module, torch = cuda_build
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    assert module.choose_cuda(torch) == (None, "there is no nvcc on PATH or in CUDA_HOME/bin")
    (torch / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert module.choose_cuda(torch) == (None, "torch 2.13.0+cpu is built without CUDA")
    monkeypatch.setenv("W2A4_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        module.choose_cuda(torch)


@pytest.mark.parametrize(
    "asked,archs,ptx", [("9.0", [90], None), ("8.0;9.0+PTX", [80, 90], 90), ("8.0 12.0a", [80], None)]
)
def test_architectures_asked_for(cuda_build, monkeypatch, asked, archs, ptx):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda_build[0].wanted_archs([75, 80, 90]) == (archs, ptx)


def test_architectures_that_are_too_old(cuda_build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    with pytest.raises(SystemExit, match="give versions >= 8.0"):
        cuda_build[0].wanted_archs([75, 80, 90])


def test_architectures_of_the_gpus_here_come_first(cuda_build, monkeypatch):
    module = cuda_build[0]
    monkeypatch.setattr(module, "_archs_here", lambda: [90])
    assert module.wanted_archs([80, 90]) == ([90], None)


@pytest.mark.skipif(tomllib is None, reason="tomllib needs Python 3.11")
def test_every_package_is_listed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(config["packages"]) - set(config["package-dir"])
    on_disk = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "w2a4").glob("**/__init__.py")}
    assert listed == on_disk


@pytest.mark.skipif(tomllib is None, reason="tomllib needs Python 3.11")
def test_torch_has_no_version_bound():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "torch" in config["project"]["dependencies"], "a bound would let pip replace an installed torch"
    assert not [r for r in config["build-system"]["requires"] if r.startswith("torch")]


def test_backend_builds_against_the_torch_that_is_there(backend, fake_torch, tmp_path):
    fake_torch("2.11.0+cu130")
    assert backend.find_torch() == tmp_path / "torch"
    assert backend._torch_requirement() == []


def test_backend_asks_for_torch_only_if_there_is_none(backend, monkeypatch):
    monkeypatch.delenv("W2A4_TORCH", raising=False)
    monkeypatch.setattr(backend.sys, "path", [])
    monkeypatch.setattr(backend, "_target_site_packages", lambda: [])
    assert backend._torch_requirement() == ["torch>=2.11"]
    monkeypatch.setenv("W2A4_BUILD_EXT", "0")
    assert backend._torch_requirement() == []


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_backend_refuses_an_old_torch_in_one_line(backend, fake_torch, version):
    fake_torch(version)
    with pytest.raises(SystemExit, match=re.escape(version) + r".*too old.*2\.11") as error:
        backend.find_torch()
    assert "\n" not in str(error.value)


def test_backend_finds_torch_of_the_target_environment_under_isolation(backend, monkeypatch):
    monkeypatch.delenv("W2A4_TORCH", raising=False)
    monkeypatch.setattr(backend.sys, "path", [])
    import torch

    assert backend.find_torch() == Path(torch.__file__).parent


def test_missing_extension_falls_back_to_the_reference():
    code = """
import sys, types, warnings
sys.modules["w2a4"] = package = types.ModuleType("w2a4")  # ops only: the whole package imports transformers
package.__path__ = ["w2a4"]
sys.modules["w2a4._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from w2a4 import ops
    from w2a4.ops import reference
messages = [str(w.message) for w in caught if "w2a4._C" in str(w.message)]
assert len(messages) == 1 and "build" in messages[0], messages
x = torch.randn(3, 64)
assert torch.equal(ops.hadamard(x, None, 64), reference.hadamard(x, None, 64))
codes, scale = ops.quantize_a4(x.requires_grad_(), torch.tensor([0.9]))
ops.hadamard(x, None, 64).sum().backward()
cache, params = torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4, 2, dtype=torch.float16)
ops.append_kv4(torch.randn(1, 1, 2, 16), cache, params, 1, 0.95)
assert params[0, 0, 1:3, 0].all() and not params[0, 0, 0].any()
assert ops.build_info().startswith("w2a4._C: not built")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_kernels_of_another_version_say_so():
    code = (
        "import sys, types; module = types.ModuleType('w2a4._C'); module.build_info = ''; "
        "sys.modules['w2a4._C'] = module; import w2a4.ops"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"ImportError: w2a4._C is of another version: it lacks .*build it", done.stderr)
