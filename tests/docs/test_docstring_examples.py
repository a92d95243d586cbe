"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import gradkern

# Left out: the native libraries, which are no Python modules, and Triton's, which a process that interprets and one
# that compiles must each set up first.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradkern.__path__, "gradkern.")
    if "triton" not in module.name and module.name not in {"gradkern._C", "gradkern._alloc", "gradkern.__main__"}
)


# Budgets count every tensor alive in the process, also those of other tests: these run in one of their own.
BUDGETED = [name for name in MODULES if name.startswith("gradkern.checkpoint")]
RUNNER = """
import doctest, importlib, sys
sys.exit(sum(doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)[0] for name in sys.argv[1:]))
"""


@pytest.mark.parametrize("name", [name for name in MODULES if name not in BUDGETED])
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_examples_with_budgets_run() -> None:
    done = subprocess.run([sys.executable, "-c", RUNNER, *BUDGETED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_were_found() -> None:
    assert "gradkern.functional" in MODULES
    assert "gradkern.checkpoint" in MODULES
