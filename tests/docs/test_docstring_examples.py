"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import gradkern

# Left out: the native libraries, which are no Python modules, and Triton's, which a process that interprets and one
# that compiles must each set up first.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradkern.__path__, "gradkern.")
    if "triton" not in module.name and module.name not in {"gradkern._C", "gradkern._alloc", "gradkern.__main__"}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_modules_were_found() -> None:
    assert "gradkern.functional" in MODULES
    assert "gradkern.checkpoint" in MODULES
