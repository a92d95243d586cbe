"""Seconds of an operator on a GPU that is not here: the larger of arithmetic and memory traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from gradkern.checkpoint._gpus import Gpu
from gradkern.checkpoint._valueless import tensors_in

__all__ = ["operator_seconds"]

_aten = torch.ops.aten

# No kernel runs: views whose schema does not say so, and memory that is left as it is.
_NO_WORK = {
    _aten._unsafe_view,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_permuted,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}

_LOOKUPS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index}


def operator_seconds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, gpu: Gpu) -> float:
    """Return ``max(flops / rate, bytes / bandwidth)`` of one call; 0 where no kernel runs. Not for views.

    Floating point operations are counted by ``torch.utils.flop_counter`` (matrix products, convolutions, attention);
    bytes are those of all tensors that go in and come out, each read or written once; where rows are looked up, those
    of the rows.
    """
    packet = getattr(func, "overloadpacket", None)
    if packet in _NO_WORK:
        return 0.0
    outputs = tensors_in(result)
    inputs = outputs if packet in _LOOKUPS else [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
    count = flop_registry.get(packet)
    flops = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
    dtype = next((tensor.dtype for tensor in outputs), torch.float32)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
    return max(flops / gpu.flops(dtype), nbytes / gpu.bytes_per_s)
