"""Options that several commands of `w2a4` share, and what they mean."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from ..errors import RecipeError
from ..format.files import try_file, write_json
from ..recipe import RECIPES, Recipe, parse_yaml

DTYPES = ("float32", "bfloat16", "float16")


def writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Check that a result file can be written, before hours of work and not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(
            f"directory {str(path.parent)!r} does not exist; create it, or give another path"
        )
    if path is not None:
        try_file(path)
    return path


def new_directory(_: click.Context, __: click.Parameter, path: Path) -> Path:
    """`.` and `..` as full paths, since files beside the directory are named after it."""
    return path if path.name not in ("", "..") else Path(os.path.realpath(path))


def is_text(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: Python decodes other bytes to lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def count(least: int) -> click.IntRange:
    """Numbers from `least` to the largest size of a tensor's dimension."""
    return click.IntRange(min=least, max=2**31 - 1)


json_file = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable,
    metavar="FILE",
    help="Also write the result as JSON.",
)
dtype = click.option(
    "--dtype", type=click.Choice(DTYPES), help="Dtype of activations and unquantised tensors."
)
device = click.option(
    "--device", metavar="cpu|cuda|cuda:N", help="Device to compute on; by default a GPU if there is one."
)
new_tokens = click.option(
    "--max-new-tokens",
    type=count(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Generate at most N tokens.",
)


out = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    callback=new_directory,
    metavar="DIR",
    help="New directory.",
)
page = click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable,
    metavar="FILE",
    help="Write an HTML page of it with pictures (needs matplotlib).",
)
settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe field, e.g. group_size=64 or rotation.r4=none. Repeatable.",
)
calib = click.option(
    "--calib",
    default="general",
    show_default=True,
    metavar="FILE|general|builtin",
    help="Calibration text: a packaged one, .txt, .jsonl, .parquet, or hub:NAME[,CONFIG][:SPLIT].",
)


DEFAULT_TEXTS = "By default two kinds of text that the package has."


class _Model(click.Argument):
    """MODEL; says so where `--eval`, which may have a value, has taken it."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter as error:
            taken = [repr(text) for text in ctx.params.get("eval_texts", ()) if text]
            if taken:
                error.message = f"--eval took {' and '.join(taken)} as text: give MODEL in front of --eval"
            raise


model = click.argument("model", cls=_Model)

_EVALUATION = (
    click.option(
        "--eval", "eval_texts", multiple=True, is_flag=False, flag_value="", metavar="[FILE|general|builtin]",
        help=f"Measure perplexity before and after; repeatable, as --text of `w2a4 eval`. {DEFAULT_TEXTS}",
    ),
    click.option(
        "--eval-windows", type=count(1), default=8, show_default=True, metavar="N",
        help="Evaluate at most N windows of 2048 tokens of each text.",
    ),
)  # fmt: skip


def windows(default: int = 8) -> Callable[..., Any]:
    """The option `--windows`."""
    return click.option(
        "--windows",
        type=count(1),
        default=default,
        show_default=True,
        metavar="N",
        help="At most N windows of each text.",
    )


def evaluation(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that reach the command as `eval_texts` and `eval_windows`."""
    return _EVALUATION[0](_EVALUATION[1](command))


def recipe(default: str, note: str) -> Any:
    return click.option(
        "--recipe",
        default=default,
        show_default=True,
        metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or a YAML file. {note}",
    )


_SAMPLING = (
    click.option(
        "--temperature", type=float, show_default="0", metavar="T",
        help="Divides the logits before a token is drawn; 0 takes the most probable one.",
    ),
    click.option(
        "--top-k", type=int, metavar="K", help="Draw from the K most probable tokens; 0 is all."
    ),
    click.option(
        "--top-p", type=float, metavar="P",
        help="Draw from the most probable tokens that make up P together.",
    ),
    click.option("--seed", type=int, metavar="N", help="Seed of the draws."),
)  # fmt: skip


def sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that reach the command as `sampling`: the given ones, as arguments of `engine.Sampling`."""

    @functools.wraps(command)
    def run(temperature: float, top_k: int, top_p: float, seed: int | None, **arguments: Any) -> Any:
        values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        given = {name: value for name, value in values.items() if value is not None}
        return command(sampling=given, **arguments)

    for option in reversed(_SAMPLING):
        run = option(run)
    return run


def load_model(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, as `--dtype` and `--device` say."""
    import torch

    from ..ops import devices
    from ..quantization import job as pipeline

    where = devices.pick_device(device)
    return pipeline.load_model(model, getattr(torch, dtype) if dtype else "auto", where)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write what `--json` asks for, if it does."""
    if path is not None:
        write_json(path, result)


def parse_recipe(name: str, settings: Sequence[str]) -> Recipe:
    return Recipe.load(name).override(**parse_settings(settings))


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Recipe fields by name, from settings `key=value`.

    Raises:
        RecipeError: a setting without `=` or name, or a value that is not YAML.
    """
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting!r}: give key=value, e.g. --set group_size=64")
        changes[key] = _scalar(setting, value)
    return changes


def _scalar(setting: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # an impossible date, too many digits, too deep
        raise RecipeError(
            f"--set {setting!r}: {text!r} is not a YAML value; give one, e.g. 64, none or 'text'"
        ) from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-2 as a string
        except ValueError:
            pass
    return value
