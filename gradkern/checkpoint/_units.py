"""Which modules of a model are the units of a plan."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Sequence

from torch import nn

__all__ = ["HEAD", "STEM", "WHOLE_MODEL", "find_units", "unit_module"]

WHOLE_MODEL = "<model>"
STEM, HEAD = "<stem>", "<head>"


def find_units(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Return the dotted names of the modules that a person would call the model's blocks.

    Where there are ``patterns``, as of files, the outermost modules whose names match one of them. Else:

    1. Repeated blocks: children of one class, at least two, of a ``ModuleList`` or ``Sequential``, that have
       parameters and children of their own; and every layer that ``transformers`` marks as a
       ``GradientCheckpointingLayer``. The outermost wins: blocks inside a block are not units.
    2. Without any: the children of the first module with more than one child.
    3. Without those: the model as one unit, ``WHOLE_MODEL``.

    The order is that of registration; what runs in which order only a forward pass shows.

    Raises:
        ValueError: A pattern matches no module.
    """
    if patterns:
        return _matching(model, patterns)
    blocks = _blocks_below(model, "")
    if blocks:
        return blocks
    parent, prefix = model, ""
    children = list(parent.named_children())
    while len(children) == 1:
        name, parent = children[0]
        prefix += name + "."
        children = list(parent.named_children())
    return [prefix + name for name, _ in children] or [WHOLE_MODEL]


def unit_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a unit.

    Raises:
        AttributeError: The model has no module of that name.
    """
    return model if name == WHOLE_MODEL else model.get_submodule(name)


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the outermost modules that match."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"units: no module of this {type(model).__name__} matches {pattern!r}, expected a pattern over the "
                f"names in model.named_modules(), such as {_nearest(pattern, names)!r}"
            )
    found: list[str] = []
    for name in names:  # parents come before their children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found.append(name)
    return found


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A name that the user may have meant."""
    return next(iter(difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)), "")


def _blocks_below(module: nn.Module, prefix: str) -> list[str]:
    """Names of the outermost repeated blocks below ``module``."""
    repeated: set[type[nn.Module]] = set()
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        classes = Counter(type(child) for child in module.children() if _is_block(child))
        repeated = {cls for cls, count in classes.items() if count > 1}
    names = []
    for name, child in module.named_children():
        if type(child) in repeated or _is_checkpointing_layer(child):
            names.append(prefix + name)
        else:
            names += _blocks_below(child, f"{prefix}{name}.")
    return names


def _is_block(module: nn.Module) -> bool:
    """Whether a module is more than one layer."""
    has_children = next(module.children(), None) is not None
    return has_children and next(module.parameters(), None) is not None


def _is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether transformers says the module may be checkpointed; by name, so it need not be installed."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
