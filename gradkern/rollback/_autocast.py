"""Layers under ``torch.autocast``: torch runs them, and hooks on its nodes take their factors in backward.

Products are computed in bf16 or fp16, of casts of the fp32 parameters that torch keeps and shares while the context is
open. Gradients of all uses of a cast are added up in the low precision before they become fp32, so no function of ours
stands in for torch's: what goes to a parameter is counted where its cast hands it on. It is counted as the sum of what
the captured products gave, so that a use which was not captured is missed there.

Factors become fp32, exactly. Their products over all samples add up to the gradient before it was rounded to the low
precision; by that rounding, which belongs to no sample, the sum of all records differs from what was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradkern.errors import LedgerError
from gradkern.rollback._nodes import below_views, require_first_order
from gradkern.rollback._ownership import LayerKind, OwnedLayer
from gradkern.rollback._sink import Sink

__all__ = ["autocast_linear", "autocast_product", "in_full_precision", "norm_input"]

# Takes a layer's factors: its output's gradient, its input where weight or logits need it, and of which parameters.
Take = Callable[[Tensor, Tensor | None, bool, bool], None]

# Of autograd's products: what it saves of the input, and where weight and bias are among what they depend on.
_PRODUCTS = {
    "AddmmBackward0": ("_saved_mat1", 2, 0),
    "MmBackward0": ("_saved_self", 1, None),
    "ConvolutionBackward0": ("_saved_input", 1, 2),
}

# In the metadata of a cast's node: the backward pass that is under way, and what the products have given in it so far.
_PENDING = "gradkern.rollback.pending"
_NOTHING: tuple[int, Tensor | None] = (-1, None)


def autocast_linear(layer: OwnedLayer, sink: Sink, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weightᵀ + bias`` as torch computes it under autocast, recorded."""

    def take(grad: Tensor, input: Tensor | None, has_weight: bool, has_bias: bool) -> None:
        if layer.is_output and input is not None:
            low = None if bias is None else bias.to(input.dtype)
            sink.take_logits(layer, F.linear(input, weight.to(input.dtype), low).float(), grad.float())
        if has_weight and input is not None:
            sink.take_matrix(layer, grad.float(), input.float(), None)
        if has_bias:
            sink.take_bias(layer, grad.float(), None)

    return autocast_product(layer, sink, input, lambda lowered: F.linear(lowered, weight, bias), take)


def autocast_product(
    layer: OwnedLayer, sink: Sink, input: Tensor, compute: Callable[[Tensor], Tensor], take: Take
) -> Tensor:
    """Run a layer under autocast and have its factors taken in backward.

    Args:
        layer: The layer.
        sink: Receives what goes to the parameters.
        input: The layer's.
        compute: Runs it.
        take: Called in backward with the output's gradient, the input where the weight's gradient or the logits ask for
            it, both in the precision of the product, and whether weight and bias have got a gradient. Weight and bias
            may come in two calls.

    Raises:
        LedgerError: torch computed it in a way that is not known here.
    """
    if not (input.is_leaf and input.requires_grad):
        # As autocast would, so that what is kept is what autograd saves. The casts of leaves it shares.
        input = input.to(torch.get_autocast_dtype(input.device.type))
    output = compute(input)
    if output.grad_fn is None:
        return output
    product, adding = _nodes(output.grad_fn)
    if adding is not None:
        _watch(adding, layer, sink, output.shape, take, None, ("", None, 1))
    places = _PRODUCTS.get("" if product is None else product.name())
    # Autograd saves the input for the weight's gradient alone.
    has_weight = places is not None and _edge(product, places[1]) is not None
    kept = _Kept() if has_weight and _are_packed() else None
    if places is not None:
        _watch(product, layer, sink, output.shape, take, kept, places)
    elif layer.weight is not None or (layer.bias is not None and adding is None):
        raise LedgerError(
            f"record: layer {layer.name!r} was computed under autocast by {product}, expected one of "
            f"{', '.join(_PRODUCTS)}; run it in fp32 (torch.autocast(enabled=False)), or exclude it with "
            f"unowned={[f'{layer.name}.*']!r}"
        )
    if kept is not None:
        output = _apply(_Keep, output, input, kept)
    elif layer.is_output and not has_weight:
        output = _apply(_Keep, output, input, lambda grad, input: take(grad, input.to(grad.dtype), False, False))
    return output


class _Kept:
    """Where a layer's input is between two nodes of a backward pass."""

    input: Any = None

    def __call__(self, grad: Tensor, input: Tensor) -> None:
        self.input = input


class _Keep(torch.autograd.Function):
    """Saves a layer's input for who asks for it in backward, where autograd does not save it, or has packed it.

    What is packed may be unpacked only once. The output is a copy, for a view made here could not be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(input)
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.receive(grad, *ctx.saved_tensors)
        return grad, None, None


def _watch(
    node: Any,
    layer: OwnedLayer,
    sink: Sink,
    shape: torch.Size,
    take: Take,
    kept: _Kept | None,
    places: tuple[str, int | None, int | None],
) -> None:
    """Hook a node, which must not be held by its own hook: that would be a cycle."""
    saved, *at = places
    for of_weight, place in zip((True, False), at, strict=True):
        cast, _ = _cast_before(node, place)
        if cast is not None:
            _hand_on(cast, layer, sink, of_weight=of_weight)

    def hook(input_grads: Sequence[Tensor | None], output_grads: Sequence[Tensor]) -> None:
        require_first_order(layer)
        own: Any = torch._C._current_autograd_node()
        grads = [None if place is None else input_grads[place] for place in at]
        for of_weight, place, each in zip((True, False), at, grads, strict=True):
            if each is not None:
                _count(own, place, each, layer, sink, of_weight=of_weight)
        has_weight, has_bias = (each is not None for each in grads)
        grad = output_grads[0].reshape(shape)
        input = None
        if kept is not None:
            input, kept.input = kept.input.to(grad.dtype), None
        elif has_weight:
            input = getattr(own, saved)
        if input is not None and input.dim() == 2:
            input = input.reshape(*shape[:-1], -1)
        take(grad, input, has_weight, has_bias)

    node.register_hook(hook)


def _count(node: Any, place: int | None, grad: Tensor, layer: OwnedLayer, sink: Sink, *, of_weight: bool) -> None:
    """Add a product's gradient of a parameter to what the parameter's cast will hand on."""
    cast, is_transposed = _cast_before(node, place)
    grad = grad.t() if is_transposed else grad
    if cast is None:
        sink.take_gradient(layer, grad.float(), of_weight=of_weight)
        return
    # In the low precision, one use after the other, as autograd does. What a failed pass left is of another task.
    task = torch._C._current_graph_task_id()
    of_task, pending = cast.metadata[_PENDING]
    cast.metadata[_PENDING] = task, pending + grad if of_task == task else grad


def _hand_on(cast: Any, layer: OwnedLayer, sink: Sink, *, of_weight: bool) -> None:
    """Have the sink take what a cast hands on to the parameter; once for all uses of the cast."""
    if _PENDING in cast.metadata:
        return
    cast.metadata[_PENDING] = _NOTHING

    def hook(input_grads: Sequence[Tensor | None], output_grads: Sequence[Tensor]) -> None:
        own: Any = torch._C._current_autograd_node()
        of_task, total = own.metadata[_PENDING]
        own.metadata[_PENDING] = _NOTHING
        if total is not None and of_task == torch._C._current_graph_task_id():
            sink.take_gradient(layer, total.float(), of_weight=of_weight)

    cast.register_hook(hook)


def _nodes(node: Any) -> tuple[Any, Any]:
    """The product that made an output, and the node that added the bias afterwards, if that was another; or None."""
    node = below_views(node)
    if node is None or node.name() != "AddBackward0":
        return node, None
    return below_views(node.next_functions[0][0]), node


def _edge(node: Any, place: int | None) -> Any:
    return None if place is None else node.next_functions[place][0]


def _cast_before(node: Any, place: int | None) -> tuple[Any, bool]:
    """The node that cast a parameter for a product, if any, and whether the product took the transposed."""
    found = _edge(node, place)
    is_transposed = found is not None and found.name() == "TBackward0"
    if is_transposed:
        found = found.next_functions[0][0]
    return (found if found is not None and found.name() == "ToCopyBackward0" else None), is_transposed


def _are_packed() -> bool:
    """Whether hooks pack what autograd saves (checkpointing, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def in_full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Compute fp32 in fp32 where backward was called under autocast."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def norm_input(kind: LayerKind, input: Tensor) -> Tensor:
    """A norm's input in the precision in which torch normalises it here: autocast casts it for some, not for others."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and _is_widened(kind, device, input.dtype):
        return input.float()
    return input


@cache
def _is_widened(kind: LayerKind, device: str, dtype: torch.dtype) -> bool:
    """Whether autocast, which is active, makes a norm's input fp32; found by trying."""
    probe = torch.ones(1, 2, dtype=dtype, device=device)
    with torch.no_grad():
        if kind is LayerKind.GROUP_NORM:
            return F.group_norm(probe, 1).dtype == torch.float32
        normalise = F.layer_norm if kind is LayerKind.LAYER_NORM else F.rms_norm
        return normalise(probe, (2,)).dtype == torch.float32
