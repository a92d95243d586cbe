"""What a ledger records: its parameters and the streams of per-sample gradients that reach them.

Plain data, stored in the catalog, so that a ledger can be read and matched with a model without the code that
recorded it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradkern.errors import LedgerError

__all__ = ["Layout", "ParameterInfo", "Stream", "describe_parameters", "digest_parameters"]


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter that the optimizer trained.

    Attributes:
        name: As ``model.named_parameters()`` gives it (a shared parameter once, under its first name).
        shape: Its shape.
        owned: True where its gradients are recorded per sample; False where the user named it unowned.
    """

    name: str
    shape: tuple[int, ...]
    owned: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """The gradients that one layer sends to one of its parameters.

    Attributes:
        layer: The layer's name in ``model.named_modules()``.
        parameter: Index into :attr:`Layout.parameters`. Tied layers share it.
        kind: ``"matrix"``, ``"embedding"`` or ``"vector"``.
    """

    layer: str
    parameter: int
    kind: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything needed to interpret the tensors in a ledger.

    Attributes:
        model: ``(name, shape, dtype)`` of every parameter of the model, trained or not: its fingerprint.
        parameters: The trained ones.
        streams: The sources of their gradients.
    """

    model: tuple[tuple[str, tuple[int, ...], str], ...]
    parameters: tuple[ParameterInfo, ...]
    streams: tuple[Stream, ...]

    def to_json(self) -> str:
        """Serialise; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(
            model=tuple((name, tuple(shape), dtype) for name, shape, dtype in fields["model"]),
            parameters=tuple(
                ParameterInfo(entry["name"], tuple(entry["shape"]), entry["owned"]) for entry in fields["parameters"]
            ),
            streams=tuple(Stream(**entry) for entry in fields["streams"]),
        )

    def trained_parameters(self, model: nn.Module) -> tuple[nn.Parameter, ...]:
        """Find the ledger's parameters in ``model``.

        Raises:
            LedgerError: ``model`` has other parameters than the recorded one; names the first difference. Or it is
                wrapped by ``DistributedDataParallel``, whose forward waits for the other ranks.
        """
        if isinstance(model, DistributedDataParallel):
            raise LedgerError(
                "a ledger is asked with the plain model, got one wrapped in DistributedDataParallel; pass model.module"
            )
        given = describe_parameters(model)
        if given != self.model:
            raise LedgerError(_difference(self.model, given))
        named = dict(model.named_parameters())
        return tuple(named[parameter.name] for parameter in self.parameters)

    def owned(self, parameters: Sequence[nn.Parameter]) -> dict[int, nn.Parameter]:
        """Those of the trained parameters that are recorded, by index."""
        pairs = zip(self.parameters, parameters, strict=True)
        return {index: each for index, (info, each) in enumerate(pairs) if info.owned}

    def digest(self, parameters: Sequence[torch.Tensor]) -> str:
        """:func:`digest_parameters` of the trained parameters, given in order."""
        names = [info.name for info in self.parameters]
        return digest_parameters(dict(zip(names, parameters, strict=True)))

    def streams_by_parameter(self, indices: Iterable[int]) -> dict[int, list[int]]:
        """The streams of each of some parameters."""
        return {
            index: [stream for stream, source in enumerate(self.streams) if source.parameter == index]
            for index in indices
        }


def describe_parameters(model: nn.Module) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Name, shape and dtype of every parameter, in model order."""
    return tuple(
        (name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
    )


def digest_parameters(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the values, in the given order; equal only for bit-equal parameters."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _difference(
    recorded: tuple[tuple[str, tuple[int, ...], str], ...],
    given: tuple[tuple[str, tuple[int, ...], str], ...],
) -> str:
    for expected, got in zip(recorded, given, strict=False):
        if expected != got:
            return (
                f"the ledger belongs to another model: it recorded parameter {expected[0]!r} of shape "
                f"{expected[1]} and dtype {expected[2]}, the model given has {got[0]!r} of shape {got[1]} "
                f"and dtype {got[2]} there; build the model with the configuration it was recorded with"
            )
    return (
        f"the ledger belongs to another model: it recorded {len(recorded)} parameters, the model given has "
        f"{len(given)}; build the model with the configuration it was recorded with"
    )
