"""Functions that the command line is given by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["import_function"]


def import_function(source: str) -> Callable[[], Any]:
    """The function that ``module:function`` names; modules of the current folder are found.

    Raises:
        ImportError: There is no such module.
        AttributeError: It has no such function.
    """
    name, _, attribute = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function: Callable[[], Any] = getattr(importlib.import_module(name), attribute)
    return function
