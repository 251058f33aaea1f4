"""Recipes: a run is a YAML file, and every key of it is also a flag.

Read in this order: schema.py (which keys a dataclass or command has, and how flags are read), recipe.py (file, then
flags, checked, built, saved).

This room knows how to fill any dataclass; it does not know what a model or a run is.
"""

from groundup.config.recipe import (
    Given,
    build,
    dump_recipe,
    find_recipe,
    parse_recipe_flags,
    read_recipe,
    recipe_files,
    save_recipe,
)
from groundup.config.schema import flatten, keys_of, make_parser, nest, parse_flags

__all__ = [
    "Given",
    "build",
    "dump_recipe",
    "find_recipe",
    "flatten",
    "keys_of",
    "make_parser",
    "nest",
    "parse_flags",
    "parse_recipe_flags",
    "read_recipe",
    "recipe_files",
    "save_recipe",
]
