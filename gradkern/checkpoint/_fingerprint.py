"""Recognising the model that a plan was made for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Fingerprint", "TensorInfo"]

TensorInfo = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Fingerprint:
    """A model's class, the names of its modules, and the names, shapes and dtypes of its parameters and buffers.

    Attributes:
        model_class: Qualified name of the class.
        modules: Names of all modules in order of registration; shared ones once.
        parameters: (name, shape, dtype) of every parameter, in order of registration; tied ones once.
        buffers: The same of every buffer.
    """

    model_class: str
    modules: tuple[str, ...]
    parameters: tuple[TensorInfo, ...]
    buffers: tuple[TensorInfo, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Take the fingerprint of ``model``."""
        return cls(
            model_class=f"{type(model).__module__}.{type(model).__qualname__}",
            modules=tuple(name for name, _ in model.named_modules()),
            parameters=_infos(model.named_parameters()),
            buffers=_infos(model.named_buffers()),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Describe the first difference to ``other``, or return None where there is none."""
        if self.model_class != other.model_class:
            return f"the class is {other.model_class}, the plan is for {self.model_class}"
        kinds: tuple[tuple[str, Sequence[str | TensorInfo], Sequence[str | TensorInfo]], ...] = (
            ("module", self.modules, other.modules),
            ("parameter", self.parameters, other.parameters),
            ("buffer", self.buffers, other.buffers),
        )
        for kind, mine, theirs in kinds:
            for left, right in itertools.zip_longest(mine, theirs):
                if left != right:
                    return f"a {kind} is {_described(right)}, the plan has {_described(left)} in its place"
        return None


def _infos(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorInfo, ...]:
    return tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors)


def _described(item: str | TensorInfo | None) -> str:
    if item is None:
        return "missing"
    if isinstance(item, str):
        return repr(item)
    name, shape, dtype = item
    return f"{name} {shape} {dtype}"
