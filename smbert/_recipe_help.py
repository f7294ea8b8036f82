"""What `--help` says of recipes: the dataclasses' own docstrings."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from .objectives import OBJECTIVES
from .recipe import Recipe
from .stages import STAGES


def recipe_help() -> str:
    """Every key of a recipe, its stages and their objectives with its default and its meaning."""
    lines = ["recipe keys (for --set and YAML):", *described(Recipe, "  ")]
    for title, kinds in (("stages", STAGES), ("objectives of a distill stage", OBJECTIVES)):
        lines.append(f"\n{title}:")
        for kind, cls in kinds.items():
            lines += ["", *wrapped(f"{kind}: {(cls.__doc__ or '').split(chr(10))[0]}", "  "), *described(cls, "    ")]
    return "\n".join(lines)


def described(cls: type[Any], indent: str) -> list[str]:
    """One paragraph for each field of a dataclass."""
    meanings = meanings_of(cls)
    lines = []
    for f in fields(cls):
        given = "" if f.default is MISSING or f.default == "" else f" = {f.default}"
        lines += wrapped(f"{f.name}{given}: {meanings.get(f.name, '')}", indent)
    return lines


def meanings_of(cls: type[Any]) -> Mapping[str, str]:
    """What the docstrings of a class and of its bases say of each attribute."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        out |= documented_attributes(base.__doc__ or "")
    return out


def documented_attributes(doc: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring: name -> text."""
    out: dict[str, str] = {}
    named: list[str] = []
    for line in inspect.cleandoc(doc).partition("Attributes:")[2].splitlines():
        if line.strip() and not line.startswith(" "):
            break  # the next section
        if line.startswith("    ") and not line.startswith("     ") and ":" in line:
            names, _, text = line.strip().partition(": ")
            named = names.split(", ")
            out |= dict.fromkeys(named, text)
        elif line.strip():
            for name in named:
                out[name] += " " + line.strip()
    return out


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False)
