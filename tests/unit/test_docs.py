"""The README and the pages of docs/: their examples run, and what they name exists in the code.

A fenced block is compiled (`python`) or its options are looked up (`bash`), and it runs unless its first line
says `no-run` with a reason. Tables of fields, messages, families and variables are compared with the code.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import w2a4
from support.paths import ROOT
from w2a4 import arch
from w2a4.arch.unsupported import REASONS
from w2a4.cli.main import main as command
from w2a4.format.manifest import Manifest
from w2a4.recipe import RECIPES, Recipe

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages whose links are checked, and nothing else.
LINKED = [*DOCS, ROOT / "benchmarks" / "results" / "README.md", ROOT / "benchmarks" / "LOG.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page, line: where its first line of content stands.
        info: what follows the opening fence.
        text: the content.
    """

    page: Path
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.split(" ")[0]

    @property
    def runs(self) -> bool:
        return "no-run" not in self.info

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    opened: tuple[int, str] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number + 1, line[3:].strip()
        else:
            first, info = opened
            yield Block(page, first + 1, info, "\n".join(lines[first:number]) + "\n")
            opened = None
    assert opened is None, f"{page.name}: the block of line {opened} has no end"


BLOCKS = [block for page in DOCS for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """Code between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of all tables below a heading, without heads and rulers, up to the next heading of its level."""
    text = prose(ROOT / page)
    level = heading.split(" ")[0]
    assert f"\n{heading}\n" in text, f"{page} has no {heading!r}"
    section = re.split(rf"(?m)^{level} ", text.split(f"\n{heading}\n")[1])[0]
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    rulers = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-:")]
    return [row for i, row in enumerate(cells) if i not in rulers and i + 1 not in rulers]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Links and paths


def anchors(page: Path) -> set[str]:
    """What the hub of code makes of headings: lower case, hyphens, no punctuation."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}; there are {anchors(found)}"


@functools.cache
def file_names() -> set[str]:
    folders = ("w2a4", "csrc", "kernels", "benchmarks", "tests", "tools", "docs", "build_backend")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {path.name for path in (*files, *ROOT.iterdir())}


#: What a reader makes, or transformers writes.
FOREIGN = {
    "config.json", "model.safetensors", "generation_config.json", "report.json", "recipe.yaml", "safetensors",
    "R.safetensors", "mine.yaml", "FIRST.gguf", "WHOLE.gguf", "results.jsonl", "modeling_*.py",
}  # fmt: skip


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_files_in_code_spans_exist(page):
    """Folders count from the root, from w2a4 or from csrc; `<op>` stands for any name."""
    suffixes = r"\.(py|md|yaml|sh|cpp|h|cu|cuh|json|jsonl|svg|png|toml|safetensors|gguf)"
    for span in spans(page):
        if not re.fullmatch(rf"[\w./<>*-]+({suffixes}|/|\.\*)", span) or span in FOREIGN:
            continue
        pattern = re.sub(r"<[^>]+>", "*", span).rstrip("/")
        found = [next((ROOT / folder).glob(pattern), None) for folder in (".", "w2a4", "csrc")]
        if "/" not in span:
            found.append(next((n for n in file_names() if Path(n).match(pattern)), None))
        assert any(found), f"{page.name} names {span}, which does not exist"


# Python


def name_chains(tree: ast.AST) -> Iterator[list[str]]:
    """`a.b.c` as lists of names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                yield [node.id, *chain]


def first_missing(start: object, names: list[str]) -> str | None:
    """The first of names, each an attribute of the one before it, that is not there."""
    for name in names:
        if not hasattr(start, name):
            return f"{start!r} has no {name}"
        start = getattr(start, name)
    return None


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_names_what_exists(block):
    tree = compile(block.text, str(block), "exec", ast.PyCF_ONLY_AST)
    imported: dict[str, object] = {}
    missing: list[str | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name] = importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                missing.append(first_missing(module, [alias.name]))
                imported[alias.asname or alias.name] = getattr(module, alias.name, None)
    for first, *rest in name_chains(tree):
        if first in imported and getattr(imported[first], "__name__", "").split(".")[0] == "w2a4":
            depth = 1 if first == "w2a4" and rest[0] in w2a4._NAMES else len(rest)
            missing.append(first_missing(imported[first], rest[:depth]))
    assert imported and not any(missing), list(filter(None, missing))


@pytest.mark.parametrize("block", [block for block in PYTHON if block.runs], ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    """What an example asserts is what a reader is told, so one that asserts nothing is no example."""
    tree = ast.parse(block.text, str(block))
    claims = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(tree, str(block), "exec"), names)
    assert claims, f"{block}: say by an assert what comes out"
    for claim in claims:  # they hold at the end too: those in a loop for its last turn
        assert eval(compile(ast.Expression(claim.test), str(block), "eval"), names), ast.unparse(claim)


def test_examples_run_or_say_why_not():
    assert len([block for block in PYTHON if block.runs]) >= 7
    for block in BLOCKS:
        assert block.runs or re.search(r"no-run \(.+\)", block.info), f"{block}: say why it is not run"


# Commands


def shell_lines() -> list[tuple[str, str]]:
    """(where, command) of every command of w2a4 or Python in blocks and code spans."""
    lines = [(str(block), line) for block in BLOCKS if block.language in ("", "bash")
             for line in block.text.splitlines()]  # fmt: skip
    lines += [(page.name, span) for page in DOCS for span in spans(page)]
    begins = re.compile(r"(w2a4 [a-z-]|python (-m )?(w2a4|benchmarks|tools)|(torchrun|accelerate) )")
    return [(where, line) for where, line in lines if begins.match(line)]


COMMANDS = shell_lines()


def check_options(where: str, known: click.Command, words: list[str]) -> None:
    options = {name for parameter in known.params for name in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word in options, f"{where}: {known.name} has no {word}; it has {sorted(options)}"


def check_recipe(where: str, words: list[str]) -> None:
    for option, value in zip(words, words[1:], strict=False):
        if option == "--recipe" and value != "NAME|FILE":
            assert value in RECIPES, f"{where}: no recipe {value}"
        if option == "--set" and value not in ("key=value", "…", "KEY=VALUE"):
            key, _, text = value.partition("=")
            Recipe().override(**{key: yaml.safe_load(text) if "e-" not in text else float(text)})


@pytest.mark.parametrize("where,line", COMMANDS)
def test_commands_have_these_options(where, line):
    words = [word.strip("[],") for word in shlex.split(line.replace("[", " ").replace("]", " "))]
    if words[0] == "w2a4" or "w2a4.cli" in words:
        rest = words[1:] if words[0] == "w2a4" else words[words.index("w2a4.cli") + 1 :]
        name, *rest = [word for word in rest if word != "…"]
        if name.startswith("-"):
            return check_options(where, command, [name])
        assert name in command.commands, f"{where}: w2a4 has no command {name}"
        check_options(where, command.commands[name], rest)
        return check_recipe(where, rest)
    assert words[0] == "python", where
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), f"{where}: {words[1]}"
        return None
    path = ROOT / (words[2].replace(".", "/") + ".py")
    assert path.is_file(), f"{where}: no module {words[2]}"
    text = path.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "harness.py").read_text(encoding="utf-8")
    for word in words[3:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{where}: {words[2]} has no {word}"


@pytest.mark.parametrize("block", [block for block in BASH if block.runs], ids=str)
def test_bash_runs(block):
    for line in block.text.splitlines():
        name, *arguments = shlex.split(line)
        assert name == "w2a4", f"{block}: mark what is not w2a4 as no-run"
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, f"{block}: {line}: {result.output}"


@pytest.mark.parametrize("heading", ["## Install", "## Run it", "## Test it"])
def test_readme_commands_are_one_line(heading):
    """.ci/run takes the line below `## Test it`; people paste the others."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n{heading}\n")[1]
    block = section.split("```")[1]
    assert len(block.strip().splitlines()) == 1, heading


def test_the_first_lines_of_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:10]
    text = " ".join(lines)
    for word in ("CPU", "H200", "vLLM", *arch.names()):
        assert word in text, f"the first ten lines do not say {word}"


# Tables


def test_every_field_of_a_recipe_has_its_default_in_the_table():
    def flat(data: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
        for key, value in data.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    written = {codes(row[0])[0]: codes(row[1])[0] for row in rows("docs/recipes.md", "## Fields")}
    fields = {key: str(value) for key, value in flat(Recipe().to_dict())}
    shown = {"True": "true", "False": "false", "None": "null"}
    expected = {key: shown.get(value, value) for key, value in fields.items()}
    assert set(written) == set(expected)
    for key, value in expected.items():
        assert written[key] == value, f"{key}: the table says {written[key]}, the default is {value}"


def test_every_named_recipe_is_in_the_table():
    assert {codes(row[0])[0] for row in rows("docs/recipes.md", "## Named recipes")} == set(RECIPES)


def test_every_field_of_the_manifest_is_in_the_table_and_the_example():
    fields = set(Manifest.__dataclass_fields__)
    assert {codes(row[0])[0] for row in rows("docs/formats.md", "## Manifest")} == fields
    example = next(block for block in blocks_of(ROOT / "docs" / "formats.md") if block.language == "json")
    quantization = yaml.safe_load(example.text)
    del quantization["quant_method"]
    config = w2a4.W2A4Config(**quantization)
    assert config.to_dict()["manifest"] == quantization["manifest"]
    assert set(config.to_dict()) == {"quant_method", *quantization}


def test_environment_variables_are_those_that_the_code_reads():
    read = r"""(?:environ\.get\(|environ\[|getenv\()\s*["'](W2A4_\w+)"""
    found: set[str] = set()
    for folder in ("w2a4", "csrc", "build_backend", "kernels", "benchmarks/experiments"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                found |= set(re.findall(read, path.read_text(encoding="utf-8")))
    written = {name for row in rows("docs/kernels.md", "## Environment variables") for name in codes(row[0])}
    assert written == found


def test_refused_families_are_those_of_the_code():
    written = {name for row in rows("docs/porting.md", "## What is refused") for name in codes(row[1])}
    assert written == set(REASONS)


def test_supported_families_are_in_the_worked_examples():
    written = {codes(row[0])[0] for row in rows("docs/porting.md", "## Worked examples")}
    assert written | {"llama"} == set(arch.names())


@functools.cache
def sentences() -> str:
    """All strings of the package, values in them as `…`, one a line."""
    found = []
    for folder in ("w2a4", "build_backend"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [n.value if isinstance(n, ast.Constant) else "…" for n in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


TABLES = ("Installation", "Models", "Recipes", "Texts", "Quantising and training", "Checkpoints", "Running")
MESSAGES = [
    codes(row[0])[0]
    for heading in TABLES
    for row in rows("docs/troubleshooting.md", f"## {heading}")
    if row[0].startswith("`")
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message):
    pattern = ".*?".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, sentences()), f"no string of the package reads {message!r}"


# The picture


def test_the_picture_is_what_its_script_draws():
    script = ROOT / "docs" / "pictures" / "pipeline.py"
    drawn = runpy.run_path(str(script), run_name="picture")["draw"]()
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawn, "run docs/pictures/pipeline.py"


def test_the_script_of_the_picture_needs_the_standard_library_only():
    tree = ast.parse((ROOT / "docs" / "pictures" / "pipeline.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in sys.stdlib_module_names
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
