"""Recognising the model that a plan was made for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import nn

__all__ = ["Fingerprint"]


@dataclass(frozen=True)
class Fingerprint:
    """A model's class and the names, shapes and dtypes of its parameters.

    Attributes:
        model_class: Qualified name of the class.
        parameters: (name, shape, dtype) of every parameter, in order of registration; tied ones once.
    """

    model_class: str
    parameters: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Take the fingerprint of ``model``."""
        return cls(
            f"{type(model).__module__}.{type(model).__qualname__}",
            tuple((name, tuple(param.shape), str(param.dtype)) for name, param in model.named_parameters()),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Describe the first difference to ``other``, or return None where there is none."""
        if self.model_class != other.model_class:
            return f"the class is {other.model_class}, the plan is for {self.model_class}"
        for mine, theirs in itertools.zip_longest(self.parameters, other.parameters):
            if mine != theirs:
                return f"a parameter is {_describe(theirs)}, the plan has {_describe(mine)} in its place"
        return None


def _describe(parameter: tuple[str, tuple[int, ...], str] | None) -> str:
    if parameter is None:
        return "missing"
    name, shape, dtype = parameter
    return f"{name} {shape} {dtype}"
