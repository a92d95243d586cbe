"""What an op is: its schema, its reference, and where its faster implementations are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Backend", "OpSpec", "Sample"]

Backend = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Sample:
    """Arguments of one call of the traceable op, for tests and benchmarks.

    Attributes:
        name: What is special about it.
        args: Positional arguments; tensors and lists of tensors are copied before the call.
        kwargs: Keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One operator.

    Attributes:
        name: Public name; ends in an underscore when it changes an argument.
        schema: Arguments and results of the traceable op, in torch's schema language, without the name.
        reference: Eager PyTorch, one IEEE operation per rounding: the meaning of the op.
        native: Same signature as ``reference``, calling the native library.
        triton: ``"module:function"`` of the Triton launcher, imported on first use on a GPU.
        traceable: Implementation of the op registered with torch: unpacks lists and calls the chosen backend.
        fake: Result of the op under tracing; None where it returns nothing.
        bytes_moved: Bytes read and written for one element, as a function of how operands are stored; for benchmarks.
    """

    name: str
    schema: str
    reference: Backend
    native: Backend
    triton: str
    traceable: Callable[..., Any]
    fake: Callable[..., Any]
    bytes_moved: Callable[..., float]
