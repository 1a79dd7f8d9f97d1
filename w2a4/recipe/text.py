"""YAML text of recipes, from files and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError, RecipeError
from ..format.files import read_text

#: Bytes that a recipe file may have.
MAX_RECIPE = 1 << 16

#: Collections in collections that a recipe may hold: the parser's time grows with their square.
_MAX_DEPTH = 20


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        RecipeError: no such file, not a regular file, longer than `MAX_RECIPE`, not YAML, or not a mapping.
    """
    try:
        data = parse_yaml(read_text(path, MAX_RECIPE))
    except FileNotFoundError:
        raise RecipeError(f"recipe file {str(path)!r} does not exist") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError is of bytes that are not UTF-8, a date that is none, a number of too many digits.
        raise RecipeError(f"recipe file {str(path)!r} is not YAML: {error}") from None
    except (OSError, CheckpointError) as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe file {str(path)!r} holds {type(data).__name__}, not a mapping of keys")
    return data


def parse_yaml(text: str) -> Any:
    """Plain data. A few bytes of aliases of aliases stand for more than memory holds, so there are none.

    Raises:
        yaml.YAMLError: not YAML, or with aliases.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"it holds the alias *{event.anchor}; write the value out")
    return yaml.safe_load(text)
