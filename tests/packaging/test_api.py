"""The public surface is what ``api.txt`` says; a change of it is seen in review.

After a change that is meant: ``python tests/packaging/test_api.py > tests/packaging/api.txt``.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from pathlib import Path

import gradkern

SNAPSHOT = Path(__file__).with_name("api.txt")
MODULES = (gradkern, gradkern.functional, gradkern.checkpoint, gradkern.rollback)


def surface() -> Iterator[str]:
    for module in MODULES:
        for name in sorted(module.__all__):
            member = getattr(module, name)
            if not isinstance(member, types.ModuleType):
                yield from describe(f"{module.__name__}.{name}", member)


def describe(path: str, member: object) -> Iterator[str]:
    if not isinstance(member, type):
        yield f"{path}{inspect.signature(member)}"
        return
    bases = ", ".join(base.__name__ for base in member.__bases__ if base is not object)
    yield f"class {path}({bases})"
    for name, attribute in sorted(vars(member).items()):
        if name == "__init__":
            yield f"    {path}{inspect.signature(attribute)}"
        elif name.startswith("_") or getattr(attribute, "hooked", False):
            # Hooked: torch writes a wrapped ``step`` into an optimizer's class when the first instance is made.
            continue
        elif isinstance(attribute, property):
            yield f"    {path}.{name}"
        elif inspect.isroutine(attribute):
            yield f"    {path}.{name}{inspect.signature(getattr(member, name))}"


def test_public_surface_is_as_recorded() -> None:
    assert list(surface()) == SNAPSHOT.read_text().splitlines()


def test_everything_public_is_documented() -> None:
    lacking = [
        f"{module.__name__}.{name}"
        for module in MODULES
        for name in module.__all__
        if not inspect.getdoc(getattr(module, name))
    ]
    assert lacking == []


def test_every_name_listed_is_there() -> None:
    for module in MODULES:
        assert sorted(module.__all__) == sorted(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)


if __name__ == "__main__":
    print("\n".join(surface()))
