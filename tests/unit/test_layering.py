"""A module imports only what stands below it, and what the layout promises holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

PACKAGE = ROOT / "w2a4"

#: Top first. CONTRIBUTING.md says why.
LAYERS = (
    "cli", "train", "quantization", "hub", "evaluate", "runtime", "arch", "recipe", "format", "ops",
)  # fmt: skip
#: May be imported from anywhere, import nothing of the package.
FREE = ("_C", "errors", "version", "moved")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First parts below `w2a4` of every import in a file, relative or absolute, at any depth."""
    module = ("w2a4", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "w2a4" else [start]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("w2a4.")}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = layer_of(path)
    if layer in FREE:
        assert not imported(path)
        return
    assert layer in LAYERS, f"{layer} has no place: add it to LAYERS here and to CONTRIBUTING.md"
    below = LAYERS[LAYERS.index(layer) :]
    modules = {layer_of(other) for other in FILES} | set(FREE)
    wrong = {name for name in imported(path) & modules if name not in below and name not in FREE}
    # `from . import __version__` and the like come out of the package itself, which may import all.
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which stand above {layer}"


def test_contributing_lists_the_same_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert " > ".join(LAYERS) in " ".join(text.split())


def test_no_module_is_too_long():
    long = {str(path): count for path in FILES if (count := len(path.read_text().splitlines())) > 500}
    assert not long


def test_nothing_shadows_the_package_kernels():
    """transformers imports Hugging Face's `kernels` if installed; a top-level package would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers.models.llama.modeling_llama"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_triton_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton"} | sys.stdlib_module_names, f"{path}: imports {name}"


def test_no_pickle_and_no_code_from_checkpoints():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load"}, f"{path}: {called}"
                given = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert called != "torch.load" or given.get("weights_only") == "True", path  # tensors alone


#: Folders of the tests, by what they test. CONTRIBUTING.md describes them.
FOLDERS = {"unit", "kernels", "models", "cli", "gpu"}
TEST_FILES = sorted(TESTS.rglob("*.py"))


def test_every_test_file_lies_in_a_folder_of_its_kind():
    tests = [path for path in TEST_FILES if path.name.startswith("test_")]
    lost = [str(path) for path in tests if path.parent not in {TESTS / name for name in FOLDERS}]
    assert not lost, f"move them to one of tests/{sorted(FOLDERS)}"
    assert len({path.name for path in tests}) == len(tests), (
        "pytest imports each by its name without a folder"
    )


def test_no_test_imports_a_test():
    tests = {path.stem for path in TEST_FILES if path.name.startswith("test_")}
    for path in TEST_FILES:
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        wrong = tests & {part for name in names for part in name.split(".")}
        assert not wrong, (
            f"{path.relative_to(TESTS)} imports {sorted(wrong)}: move what is shared to support/"
        )
