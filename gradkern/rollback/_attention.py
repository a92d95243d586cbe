"""``nn.MultiheadAttention``: torch's own function, with its projections recorded.

The projections are no layers: a packed weight, or parts of it, goes to ``linear`` inside
:func:`torch.nn.functional.multi_head_attention_forward`. Here that very function runs with another ``linear``, which it
finds by name, in copies of it and of its helpers; torch itself is left alone. All else (masks, dropout, heads) is
torch's, of every version. Were a projection made in another way, its gradient would be missed at the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

from gradkern.errors import LedgerError
from gradkern.rollback._ownership import OwnedLayer
from gradkern.rollback._sink import Sink

__all__ = ["TimeFirst", "attend"]

# A recorded ``input @ weightᵀ + bias``, and the one in use.
Linear = Callable[[OwnedLayer, Any, Tensor, Tensor, Tensor | None], Tensor]
_current: ContextVar[Callable[..., Tensor]] = ContextVar("linear")


def attend(layer: OwnedLayer, sink: Sink, linear: Linear, *args: Any, **kwargs: Any) -> Any:
    """Run an attention module as torch does when it trains.

    Args:
        layer: The module, with its projections for parts.
        sink: Receives their factors, samples first.
        linear: Computes and records a projection.
        *args: Of the module's forward.
        **kwargs: The same.

    Raises:
        LedgerError: The inputs have no dimension of samples.
    """
    module: Any = layer.module
    query = args[0] if args else kwargs["query"]
    if query.dim() != 3:
        raise LedgerError(
            f"record: attention {layer.name!r} got a query of shape {tuple(query.shape)}, expected three dimensions, "
            f"one of them the samples; add it with unsqueeze({0 if module.batch_first else 1})"
        )
    samples = query.shape[0 if module.batch_first else 1]
    parts = {id(_weight_of(part)): part for part in layer.parts}

    def project(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        whole = weight if weight._base is None else weight._base
        part = parts.get(id(whole))
        if part is None:
            return F.linear(input, weight, bias)
        own = TimeFirst(sink, samples, _beside(weight), (0, 0) if bias is None else _beside(bias))
        return linear(part, own, input, weight, bias)

    token = _current.set(project)
    try:
        return _forward()(module, *args, **kwargs)
    finally:
        _current.reset(token)


def _beside(rows: Tensor) -> tuple[int, int]:
    """How many rows a parameter has before and after some of it."""
    if rows._base is None:
        return 0, 0
    before = int(rows.storage_offset() - rows._base.storage_offset()) // int(rows.stride(0))
    return before, len(rows._base) - before - len(rows)


class TimeFirst:
    """Between a layer and the sink: puts samples before time, and part of a parameter into the whole.

    Args:
        sink: The one for whole parameters.
        samples: How many there are, for inputs that have time and samples in one dimension.
        beside: How many rows of the weight are before and after those of the projection.
        beside_bias: The same of the bias.
    """

    paused = False

    def __init__(
        self,
        sink: Sink,
        samples: int | None = None,
        beside: tuple[int, int] = (0, 0),
        beside_bias: tuple[int, int] = (0, 0),
    ) -> None:
        self._sink, self._samples, self._beside, self._beside_bias = sink, samples, beside, beside_bias

    def take_matrix(
        self,
        layer: OwnedLayer,
        rows: Tensor,
        columns: Tensor,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None = None,
        is_transposed: bool = False,
    ) -> None:
        """See :class:`gradkern.rollback._sink.Sink`, as of the methods below."""
        if weight_grad is not None:
            weight_grad = _pad(weight_grad.t() if is_transposed else weight_grad, (0, 0, *self._beside))
        own = _pad(self._samples_first(rows), self._beside)
        is_alike = self._beside == self._beside_bias
        whole_bias = None if bias_grad is None or not is_alike else _pad(bias_grad, self._beside_bias)
        self._sink.take_matrix(layer, own, self._samples_first(columns), weight_grad, whole_bias)
        if bias_grad is not None and not is_alike:
            self.take_bias(layer, rows, bias_grad)

    def take_bias(self, layer: OwnedLayer, grad: Tensor, bias_grad: Tensor | None) -> None:
        """The bias's part alone."""
        if bias_grad is not None:
            bias_grad = _pad(bias_grad, self._beside_bias)
        self._sink.take_bias(layer, _pad(self._samples_first(grad), self._beside_bias), bias_grad)

    def take_gradient(self, layer: OwnedLayer, gradient: Tensor, *, of_weight: bool) -> None:
        """What goes to the part of a parameter."""
        around = (0, 0, *self._beside) if of_weight else self._beside_bias
        self._sink.take_gradient(layer, _pad(gradient, around), of_weight=of_weight)

    def take_logits(self, layer: OwnedLayer, logits: Tensor, grad: Tensor) -> None:
        """What the last Linear of all gave, where that is in a Transformer."""
        self._sink.take_logits(layer, self._samples_first(logits), self._samples_first(grad))

    def take_norm(self, layer: OwnedLayer, normalised: Tensor, grad: Tensor, *given: Tensor | None) -> None:
        """Of a norm between attentions."""
        self._sink.take_norm(layer, self._samples_first(normalised), self._samples_first(grad), *given)

    def _samples_first(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and self._samples is not None:
            tensor = tensor.unflatten(0, (-1, self._samples))
        return tensor.transpose(0, 1)


def _pad(tensor: Tensor, around: tuple[int, ...]) -> Tensor:
    """With zeros around; the tensor itself where there are none to add."""
    return F.pad(tensor, around) if any(around) else tensor


def _weight_of(part: OwnedLayer) -> Tensor:
    weight: Tensor = getattr(part.module, part.parameter_name)
    return weight


@cache
def _forward() -> Callable[..., Any]:
    """``nn.MultiheadAttention.forward``, whose functions find the current ``linear`` by that name."""
    names: dict[str, Any] = {**vars(F), "linear": lambda *args: _current.get()(*args)}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        names[name] = _copy(getattr(F, name), names)
    forward: Callable[..., Any] = _copy(
        nn.MultiheadAttention.forward, {**vars(activation), "F": SimpleNamespace(**names)}
    )
    return forward


def _copy(function: Any, names: dict[str, Any]) -> Any:
    """A function that finds ``names`` in place of its module's."""
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
