"""Recipes: frozen dataclasses that say how a model is quantised, and the YAML files of the named ones.

Every field can be overridden (`w2a4 quantize --set rotation.r4=none`). A checkpoint keeps the recipe that it
was made by in `recipe.yaml` and in `config.json`; loading reads the manifest instead, see `format.manifest`.
"""

from .recipe import RECIPES, Recipe, write_yaml
from .rotation import RotationConfig, RotationLearning
from .text import parse_yaml
from .training import Training

__all__ = ["RECIPES", "Recipe", "RotationConfig", "RotationLearning", "Training", "parse_yaml", "write_yaml"]
