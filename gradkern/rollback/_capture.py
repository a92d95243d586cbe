"""Takes per-sample factors out of backward: owned layers run through autograd functions of ours.

Each function saves what autograd saves anyway for that layer and computes the same gradients with the same
calls, so for fp32 they are bit-equal to the layer's own. In backward it also hands the layer's input and output
gradient to a :class:`~gradkern.rollback._sink.Sink`. Nothing is taken in forward: a recomputed layer (activation
checkpointing) is seen once. Under autocast products are left to torch, see :mod:`gradkern.rollback._autocast`.

A Linear, Conv1D or LayerNorm mostly needs no function of ours: a hook on autograd's own node reads there what it
saved, at a third of the time. Where hooks on saved tensors are active (checkpointing, offloading) a tensor may be
unpacked only once, by its node, so there ours stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradkern.errors import LedgerError
from gradkern.rollback._attention import TimeFirst, attend
from gradkern.rollback._autocast import autocast_linear, autocast_product, in_full_precision, norm_input
from gradkern.rollback._nodes import below_views, require_first_order
from gradkern.rollback._ownership import LayerKind, OwnedLayer
from gradkern.rollback._sink import Sink

__all__ = ["captured"]


@contextmanager
def captured(layers: Sequence[OwnedLayer], sink: Sink) -> Iterator[None]:
    """Run ``layers`` through the capturing functions while the context is open.

    Only the instances' ``forward`` attribute is set and removed again; types, parameters, hooks and
    ``state_dict`` keys stay. A deep copy made meanwhile runs as an ordinary model.
    """
    by_module: dict[nn.Module, tuple[OwnedLayer, Any]] = {
        layer.module: (layer, TimeFirst(sink) if layer.is_time_first else sink) for layer in layers
    }

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer, to = by_module.get(module, (None, sink))
        if layer is None or sink.paused or not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        return _FORWARDS[layer.kind](layer, to, *args, **kwargs)

    for layer in layers:
        # A bound method, so that deepcopy binds the copy's forward to the copy.
        layer.module.forward = MethodType(forward, layer.module)
    try:
        yield
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)


class _Linear(torch.autograd.Function):
    """``input @ weightᵀ + bias``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, layer: OwnedLayer, sink: Sink) -> Tensor:
        ctx.layer, ctx.sink = layer, sink
        # Of such inputs torch adds the bias by itself, and so adds up the gradient as it is laid out.
        ctx.is_bias_apart = input.dim() > 2 and not input.is_contiguous()
        if layer.is_output:
            # To compute the logits once more in backward: held until then they would be as large as all else together.
            ctx.save_for_backward(input, weight, bias)
        else:
            ctx.save_for_backward(*_factors(ctx, input, weight), None)
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        input_grad = weight_grad = bias_grad = None
        if ctx.layer.is_output:
            ctx.sink.take_logits(ctx.layer, _logits(input, weight, bias), grad)
        if ctx.needs_input_grad[0]:
            input_grad = (flat @ weight).reshape(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            weight_grad = flat.t() @ input.reshape(-1, input.shape[-1])
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(list(range(grad.dim() - 1))) if ctx.is_bias_apart else flat.sum(0)
        if weight_grad is not None:
            ctx.sink.take_matrix(ctx.layer, grad, input, weight_grad, bias_grad)
        elif bias_grad is not None:
            ctx.sink.take_bias(ctx.layer, grad, bias_grad)
        return input_grad, weight_grad, bias_grad, None, None


def _watch(layer: OwnedLayer, sink: Sink, output: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Take a Linear's or Conv1D's factors at the node of ``output``; False where that is none of those known here."""
    node = below_views(output.grad_fn)
    name = "" if node is None else node.name()
    if name not in _PRODUCTS:
        return False
    saved, is_transposed, shape = _PRODUCTS[name], layer.kind is LayerKind.CONV1D, output.shape
    # Large ones are computed once more in backward: until then they would be as large as all else together.
    logits = output.detach() if layer.is_output and output.nbytes <= _SMALL_LOGITS else None
    version = output._version

    def take(input_grads: Sequence[Tensor | None], output_grads: Sequence[Tensor]) -> None:
        require_first_order(layer)
        weight_grad = input_grads[-1]
        if weight_grad is None:
            return  # torch.autograd.grad of something else
        # Asked for here: a hook that held its own node would be a cycle, and keep the graph until garbage is collected.
        grad, input = output_grads[0], getattr(torch._C._current_autograd_node(), saved)
        if len(shape) > 2:
            grad, input = grad.view(shape), input.view(*shape[:-1], -1)
        bias_grad = input_grads[0] if saved == "_saved_mat1" else None
        if is_transposed:
            sink.take_matrix(layer, input, grad, weight_grad)
            if bias_grad is not None:
                sink.take_bias(layer, grad, bias_grad)
            return
        if layer.is_output:
            intact = None if logits is None or logits._version != version else logits
            sink.take_logits(layer, _logits(input, weight, bias) if intact is None else intact, grad)
        sink.take_matrix(layer, grad, input, weight_grad, bias_grad, True)

    node.register_hook(take)
    return True


def _watch_norm(layer: OwnedLayer, sink: Sink, output: Tensor) -> bool:
    """As :func:`_watch`, of a LayerNorm."""
    node = output.grad_fn
    if node is None or node.name() != "NativeLayerNormBackward0":
        return False
    dims = len(cast(Any, layer.module).normalized_shape)

    def take(input_grads: Sequence[Tensor | None], output_grads: Sequence[Tensor]) -> None:
        require_first_order(layer)
        _, weight_grad, *rest = input_grads
        bias_grad = rest[0] if rest else None
        if weight_grad is None and bias_grad is None:
            return  # torch.autograd.grad of something else
        own: Any = torch._C._current_autograd_node()
        normalised = (own._saved_input - own._saved_result1) * own._saved_result2
        sink.take_norm(layer, normalised.flatten(-dims), output_grads[0].flatten(-dims), weight_grad, bias_grad)

    node.register_hook(take)
    return True


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Once more."""
    with in_full_precision(input.device):
        return F.linear(input, weight, bias)


def _can_watch(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all parameters of a layer are trained, and its node is the first to unpack what it saves."""
    trained = weight.requires_grad and (bias is None or bias.requires_grad)
    is_plain = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    return trained and is_plain and torch._C._functorch.peek_interpreter_stack() is None


# Bytes of logits that are kept from forward, beside the log-probabilities of as many that the loss keeps.
_SMALL_LOGITS = 1 << 21

# Names of autograd's nodes, and of what they save of their first factor.
_PRODUCTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}


class _Conv1D(torch.autograd.Function):
    """``input @ weight + bias``: transformers' Linear with a transposed weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, layer: OwnedLayer, sink: Sink) -> Tensor:
        ctx.layer, ctx.sink = layer, sink
        ctx.save_for_backward(*_factors(ctx, input, weight))
        flat = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight)
        return flat.view(*input.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        input_grad = weight_grad = bias_grad = None
        if weight is not None:
            input_grad = (flat @ weight.t()).reshape(*grad.shape[:-1], weight.shape[0])
        if input is not None:
            weight_grad = input.reshape(-1, input.shape[-1]).t() @ flat
            ctx.sink.take_matrix(ctx.layer, input, grad, weight_grad)
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0)
            ctx.sink.take_bias(ctx.layer, grad, bias_grad)
        return input_grad, weight_grad, bias_grad, None, None


class _Embedding(torch.autograd.Function):
    """Rows of ``weight``; where the ids are shared by all samples, one copy of the output per sample."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int, layer: OwnedLayer, sink: Sink) -> Tensor:
        ctx.layer, ctx.sink, ctx.padding_idx = layer, sink, padding_idx
        ctx.num_rows = weight.shape[0]
        ctx.save_for_backward(ids)
        output = F.embedding(ids, weight, padding_idx if padding_idx >= 0 else None)
        return sink.expand_shared(layer, output, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        lookup_grad = grad.sum_to_size((*ids.shape, grad.shape[-1]))
        weight_grad = torch.ops.aten.embedding_dense_backward(lookup_grad, ids, ctx.num_rows, ctx.padding_idx, False)
        if ctx.padding_idx >= 0:
            grad = grad.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        ctx.sink.take_embedding(ctx.layer, ids, grad)
        return weight_grad, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation with a weight and perhaps a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        eps: float,
        layer: OwnedLayer,
        sink: Sink,
    ) -> Tensor:
        ctx.layer, ctx.sink, ctx.shape = layer, sink, shape
        output, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), input, ctx.shape, mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
        )
        normalised, dims = (input - mean) * rstd, len(ctx.shape)
        ctx.sink.take_norm(ctx.layer, normalised.flatten(-dims), grad.flatten(-dims), *grads[1:])
        return *grads, None, None, None, None


class _Scale(torch.autograd.Function):
    """``weight * normalised``: what is trained of an RMSNorm."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, weight: Tensor, layer: OwnedLayer, sink: Sink) -> Tensor:
        ctx.layer, ctx.sink = layer, sink
        ctx.save_for_backward(normalised, weight)
        return weight * normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, weight = ctx.saved_tensors
        input_grad = grad * weight if ctx.needs_input_grad[0] else None
        weight_grad = (grad * normalised).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        dims = weight.dim()
        ctx.sink.take_norm(ctx.layer, normalised.flatten(-dims), grad.flatten(-dims), weight_grad, None)
        return input_grad, weight_grad, None, None


class _GroupNorm(torch.autograd.Function):
    """Group normalisation with a weight and a bias."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, layer: OwnedLayer, sink: Sink
    ) -> Tensor:
        ctx.layer, ctx.sink, ctx.groups = layer, sink, groups
        ctx.memory_format = _memory_format(input)
        input = input.contiguous(memory_format=ctx.memory_format)
        ctx.sizes = input.shape[0], input.shape[1], input.shape[2:].numel()
        normed: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm(
            input, weight, bias, *ctx.sizes, groups, eps
        )
        output, mean, rstd = normed
        ctx.save_for_backward(input, weight, mean, rstd)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.memory_format)
        grads = torch.ops.aten.native_group_norm_backward(
            grad, input, mean, rstd, weight, *ctx.sizes, ctx.groups, list(ctx.needs_input_grad[:3])
        )
        normalised = (input.reshape(len(input), ctx.groups, -1) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        channels_last = normalised.reshape(ctx.sizes).transpose(1, 2), grad.reshape(ctx.sizes).transpose(1, 2)
        ctx.sink.take_norm(ctx.layer, *channels_last, *grads[1:])
        return *grads, None, None, None, None


def _memory_format(input: Tensor) -> torch.memory_format:
    """The one that torch's group norm computes in, on a CPU that of its input."""
    if input.device.type == "cpu" and input.dim() in (4, 5) and not input.is_contiguous():
        channels_last = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        if input.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


class _Convolution(torch.autograd.Function):
    """A convolution over one to three dimensions, with zeros around its input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        layer: OwnedLayer,
        sink: Sink,
    ) -> Tensor:
        ctx.layer, ctx.sink, ctx.padding = layer, sink, padding
        ctx.geometry = layer.module.stride, padding, layer.module.dilation, False, [0] * len(padding)
        ctx.save_for_backward(input, weight)
        output: Tensor = torch.ops.aten.convolution(input, weight, bias, *ctx.geometry, layer.module.groups)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        module, needs = ctx.layer.module, list(ctx.needs_input_grad[:3])
        sizes = [weight.shape[0]] if needs[2] else None
        grads = torch.ops.aten.convolution_backward(grad, input, weight, sizes, *ctx.geometry, module.groups, needs)
        rows = grad.flatten(2).transpose(1, 2)
        if needs[1]:
            _take_windows(ctx.layer, ctx.sink, ctx.padding, input, rows, grads[1], grads[2])
        if needs[2] and not (needs[1] and module.groups == 1):
            ctx.sink.take_bias(ctx.layer, rows, grads[2])
        return *grads, None, None, None


def _take_windows(
    layer: OwnedLayer,
    sink: Sink,
    padding: Sequence[int],
    input: Tensor,
    rows: Tensor,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> None:
    """Hand over what a convolution's weight gets; in one group with ``bias_grad``, where there is one."""
    module: Any = layer.module
    columns = _windows(input, module.kernel_size, module.stride, padding, module.dilation)
    if module.groups == 1:
        sink.take_matrix(layer, rows, columns.flatten(2), weight_grad, bias_grad)
        return
    grouped = rows.unflatten(2, (module.groups, -1)), columns.unflatten(2, (module.groups, -1)).flatten(3)
    with in_full_precision(input.device):
        products = torch.einsum("nlgo,nlgk->ngok", *grouped)
    sink.take_vectors(layer, products, weight_grad)


def _windows(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution sees at each place: shape ``(N, places, channels, kernel)``."""
    found = F.pad(input, [each for size in reversed(padding) for each in (size, size)])
    dims = len(kernel)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        found = found.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    places_first = found.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return places_first.flatten(2 + dims).flatten(1, dims)


def _factors(ctx: Any, input: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What autograd would save: the input for the weight's gradient, the weight for the input's."""
    return input if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None


def _linear(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    # Not through nn.Module's attributes, which take longer than all else here.
    parameters = layer.module._parameters
    weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
    if torch.is_autocast_enabled(input.device.type):
        return autocast_linear(layer, sink, input, weight, bias)
    # Of other inputs torch adds the bias by itself, which is another node.
    if _can_watch(weight, bias) and (bias is None or input.dim() == 2 or input.is_contiguous()):
        output = F.linear(input, weight, bias)
        if _watch(layer, sink, output, weight, bias):
            return output
    return _apply(_Linear, input, weight, bias, layer, sink)


def _conv1d(layer: OwnedLayer, sink: Sink, x: Tensor) -> Any:
    module: Any = layer.module
    if torch.is_autocast_enabled(x.device.type):

        def take(grad: Tensor, input: Tensor | None, has_weight: bool, has_bias: bool) -> None:
            if has_weight and input is not None:
                sink.take_matrix(layer, input.float(), grad.float(), None)
            if has_bias:
                sink.take_bias(layer, grad.float(), None)

        return autocast_product(layer, sink, x, lambda lowered: type(module).forward(module, lowered), take)
    if _can_watch(module.weight, module.bias):
        output: Tensor = type(module).forward(module, x)
        if _watch(layer, sink, output, module.weight, module.bias):
            return output
    return _apply(_Conv1D, x, module.weight, module.bias, layer, sink)


def _embedding(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    padding_idx = layer.module.padding_idx
    return _apply(_Embedding, layer.module.weight, input, -1 if padding_idx is None else padding_idx, layer, sink)


def _layer_norm(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    module: Any = layer.module
    input = norm_input(layer.kind, input)
    if _can_watch(module.weight, module.bias):
        output = F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
        if _watch_norm(layer, sink, output):
            return output
    return _apply(_LayerNorm, input, module.weight, module.bias, module.normalized_shape, module.eps, layer, sink)


def _rms_norm(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    module: Any = layer.module
    if isinstance(module, nn.RMSNorm):
        input = norm_input(layer.kind, input)
        normalised = F.rms_norm(input.float(), module.weight.shape, None, module.eps)
        return _apply(_Scale, normalised, module.weight, layer, sink).type_as(input)
    # Those of transformers round to the input's precision before they scale.
    normalised = F.rms_norm(input.float(), module.weight.shape, None, module.variance_epsilon).type_as(input)
    return _apply(_Scale, normalised, module.weight, layer, sink)


def _group_norm(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    module = layer.module
    input = norm_input(layer.kind, input)
    return _apply(_GroupNorm, input, module.weight, module.bias, module.num_groups, module.eps, layer, sink)


def _convolution(layer: OwnedLayer, sink: Sink, input: Tensor) -> Any:
    module: Any = layer.module
    if input.dim() != 2 + len(module.kernel_size):
        raise LedgerError(
            f"record: convolution {layer.name!r} got an input of shape {tuple(input.shape)}, expected one with samples "
            f"along dimension 0 and {1 + len(module.kernel_size)} more; add the dimension with unsqueeze(0)"
        )
    # Of every dimension, the last one first: what is added before and after.
    sides = list(zip(*[iter(module._reversed_padding_repeated_twice)] * 2, strict=True))
    padding = tuple(min(pair) for pair in reversed(sides))
    if module.padding_mode != "zeros":
        input, padding = F.pad(input, list(chain(*sides)), mode=module.padding_mode), (0,) * len(sides)
    elif any(before != after for before, after in sides):
        # Of "same" padding one side may be longer, which torch, too, adds to a copy of the input.
        input = F.pad(input, [each - min(pair) for pair in sides for each in pair])
    if torch.is_autocast_enabled(input.device.type):
        return _autocast_convolution(layer, sink, input, padding)
    return _apply(_Convolution, input, module.weight, module.bias, padding, layer, sink)


def _autocast_convolution(layer: OwnedLayer, sink: Sink, input: Tensor, padding: Sequence[int]) -> Tensor:
    module: Any = layer.module
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]

    def compute(lowered: Tensor) -> Tensor:
        output: Tensor = convolve(
            lowered, module.weight, module.bias, module.stride, padding, module.dilation, module.groups
        )
        return output

    def take(grad: Tensor, input: Tensor | None, has_weight: bool, has_bias: bool) -> None:
        rows = grad.float().flatten(2).transpose(1, 2)
        if has_weight and input is not None:
            _take_windows(layer, sink, padding, input.float(), rows, None, None)
        if has_bias:
            sink.take_bias(layer, rows, None)

    return autocast_product(layer, sink, input, compute, take)


def _attention(layer: OwnedLayer, sink: Sink, *args: Any, **kwargs: Any) -> Any:
    return attend(layer, sink, _project, *args, **kwargs)


def _project(part: OwnedLayer, sink: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return autocast_linear(part, sink, input, weight, bias)
    output: Tensor = _apply(_Linear, input, weight, bias, part, sink)
    return output


_FORWARDS: dict[LayerKind, Callable[..., Any]] = {
    LayerKind.LINEAR: _linear,
    LayerKind.CONV1D: _conv1d,
    LayerKind.EMBEDDING: _embedding,
    LayerKind.LAYER_NORM: _layer_norm,
    LayerKind.RMS_NORM: _rms_norm,
    LayerKind.GROUP_NORM: _group_norm,
    LayerKind.CONVOLUTION: _convolution,
    LayerKind.ATTENTION: _attention,
}


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The one place that calls what torch leaves untyped."""
    return function.apply(*args)
