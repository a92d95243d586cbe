"""Stateless functions over lists of tensors: the only module that calls ops.

Eager calls pass a table of addresses straight to the chosen backend; traced calls (``torch.compile``) go through one
registered op. Both run the same kernels. Mutated tensors get their version counter bumped, which kernels that write
through addresses do not do by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from gradkern.ops import _registry
from gradkern.ops._chunks import chunk_count
from gradkern.ops._table import AddressTable, Operands
from gradkern.ops.abs_norm.spec import SPEC as ABS_NORM
from gradkern.ops.accumulate.spec import SPEC as ACCUMULATE
from gradkern.ops.adamw_step.reference import AdamWHyper
from gradkern.ops.adamw_step.spec import COLUMNS as ADAMW_COLUMNS
from gradkern.ops.adamw_step.spec import SPEC as ADAMW_STEP
from gradkern.ops.step_scalars import reference as scalar_layout
from gradkern.ops.step_scalars.spec import SPEC as STEP_SCALARS
from gradkern.ops.sumsq.spec import SPEC as SUMSQ
from gradkern.ops.sumsq_exact import reference as exact_layout
from gradkern.ops.sumsq_exact.reference import exact_partials
from gradkern.ops.sumsq_exact.spec import SPEC as SUMSQ_EXACT

__all__ = [
    "abs_norm",
    "accumulate_",
    "accumulate_with_partials_",
    "adamw_operands",
    "adamw_step_",
    "adamw_step_of_",
    "exact_partials",
    "new_partials",
    "new_scalars",
    "step_scalars_",
    "sumsq",
    "sumsq_exact",
    "sumsq_of",
]


def new_partials(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised fp64 tensor with room for one partial per chunk of ``tensors``."""
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(sum(chunk_count(t.numel()) for t in tensors), dtype=torch.float64, device=device)


def new_scalars(device: torch.device) -> torch.Tensor:
    """A zeroed fp64 block for :func:`step_scalars_`: norm, gradient multiplier, skip flag, clip coefficient."""
    return torch.zeros(scalar_layout.SIZE, dtype=torch.float64, device=device)


def sumsq(
    tensors: Sequence[torch.Tensor],
    partials: torch.Tensor | None = None,
    *,
    cache: AddressTable | None = None,
) -> torch.Tensor:
    """Sum of squares of every chunk of 4,096 elements.

    Args:
        tensors: fp32, bf16 or fp16, all of one dtype and device, dense.
        partials: fp64, shape ``(chunks,)``, overwritten; a new tensor when None.
        cache: Table kept from the last call with the same tensors.

    Returns:
        The partials, in order of tensors.

    Numerics:
        Squares are exact in fp64, added in a fixed tree; same bits on every backend, thread count and ISA.
    """
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops.gradkern.sumsq.default(list(tensors))
        return traced if partials is None else partials.copy_(traced)
    operands = Operands(SUMSQ.name, {"tensors": tensors}, cache)
    if partials is None:
        partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(SUMSQ, partials.device)(operands, partials)
    return partials


def sumsq_of(operands: Operands, column: str) -> torch.Tensor:
    """Partials of one operand of a call that is about to be made, from the table made for that call."""
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(SUMSQ, partials.device)(operands, partials, column=column)
    return partials


def sumsq_exact(tensors: Sequence[torch.Tensor], *, cache: AddressTable | None = None) -> torch.Tensor:
    """Sum of squares of all elements without a rounding anywhere, as an integer.

    Args:
        tensors: fp32, bf16 or fp16, all of one dtype and device, dense.
        cache: Table kept from the last call with the same tensors.

    Returns:
        int64, shape ``(24,)``: 22 limbs of 32 bits, limb ``k`` worth ``2**(32 k - 352)``; then how many values are
        infinite and how many are NaN. Sums of such tensors, over lists or over processes, are the sums of squares of
        everything together; :func:`exact_partials` hands them to :func:`step_scalars_`.

    Numerics:
        Exact; hence the same bits for any cut of the tensors at any element, any order, thread count and backend.
    """
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops.gradkern.sumsq_exact.default(list(tensors))
        return traced
    operands = Operands(SUMSQ_EXACT.name, {"tensors": tensors}, cache)
    limbs = torch.empty(exact_layout.WORDS, dtype=torch.int64, device=operands.device())
    _registry.select(SUMSQ_EXACT, limbs.device)(operands, limbs)
    return limbs


def abs_norm(
    tensors: Sequence[torch.Tensor], *, maximum: bool = False, cache: AddressTable | None = None
) -> torch.Tensor:
    """Sum of magnitudes, or the largest magnitude, of every chunk of 4,096 elements.

    Args:
        tensors: fp32, bf16 or fp16, all of one dtype and device, dense.
        maximum: The largest magnitude instead of the sum.
        cache: Table kept from the last call with the same tensors.

    Returns:
        fp64, shape ``(chunks,)``, in order of tensors; NaN for a chunk that holds one.

    Numerics:
        Magnitudes are exact in fp64, added in the tree of :func:`sumsq`; same bits on every backend.
    """
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops.gradkern.abs_norm.default(list(tensors), maximum=maximum)
        return traced
    operands = Operands(ABS_NORM.name, {"tensors": tensors}, cache)
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(ABS_NORM, partials.device)(operands, partials, maximum=maximum)
    return partials


def accumulate_(
    main_grads: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    partials: torch.Tensor | None = None,
    *,
    overwrite: bool = False,
    cache: AddressTable | None = None,
) -> None:
    """Fold micro-batch gradients into fp32 buffers, in place: ``main_grads += grads``, or ``= grads``.

    Args:
        main_grads: fp32, dense; mutated.
        grads: fp32, bf16 or fp16, one dtype, same shapes and strides.
        partials: fp64, shape ``(chunks,)``; receives the sum of squares per chunk of the new ``main_grads`` from the
            same pass over memory. None: no norm is taken.
        overwrite: Set instead of add; the old content is not read.
        cache: Table kept from the last call with the same operands.

    Numerics:
        Gradients widen to fp32 exactly; one fp32 rounding per element.
    """
    if torch.compiler.is_compiling():
        torch.ops.gradkern.accumulate_.default(list(main_grads), list(grads), partials, overwrite=overwrite)
    else:
        operands = Operands(ACCUMULATE.name, {"main_grads": main_grads, "grads": grads}, cache)
        _registry.select(ACCUMULATE, operands.device())(operands, partials, overwrite=overwrite)
    increment_version(main_grads)


def accumulate_with_partials_(
    main_grads: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    *,
    overwrite: bool = False,
    cache: AddressTable | None = None,
) -> torch.Tensor:
    """As :func:`accumulate_`; returns the partials of the new ``main_grads``, fp64, one per chunk."""
    if torch.compiler.is_compiling():
        partials = new_partials(main_grads)
        accumulate_(main_grads, grads, partials, overwrite=overwrite)
        return partials
    operands = Operands(ACCUMULATE.name, {"main_grads": main_grads, "grads": grads}, cache)
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(ACCUMULATE, partials.device)(operands, partials, overwrite=overwrite)
    increment_version(main_grads)
    return partials


def step_scalars_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    *,
    max_norm: float | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Form the scalars of a step and count it, on the device, without synchronising.

    Args:
        scalars: fp64, shape ``(4,)``; overwritten with norm, gradient multiplier, skip flag, clip coefficient.
        steps: fp32 step counters; each gains one unless the step is skipped.
        partials: fp64 partials of all gradients, from :func:`sumsq` or :func:`accumulate_`.
        max_norm: Threshold of the L2 norm; None does not clip.
        grad_scale: 0-dim loss scale that gradients still carry.
        found_inf: 0-dim; non-zero skips the step.

    Numerics:
        The partials are summed exactly, so the norm does not depend on their order.
    """
    limit = math.inf if max_norm is None else max_norm
    for name, blocks, dtype in (("steps", steps, torch.float32), ("partials", partials, torch.float64)):
        for i, block in enumerate(blocks):
            if block.dtype != dtype or block.device != scalars.device or not block.is_contiguous():
                raise ValueError(
                    f"step_scalars_: {name}[{i}] is {block.dtype} on {block.device}, stride {block.stride()}, expected "
                    f"contiguous {dtype} on {scalars.device}"
                )
    if torch.compiler.is_compiling():
        torch.ops.gradkern.step_scalars_.default(
            scalars, list(steps), list(partials), max_norm=limit, grad_scale=grad_scale, found_inf=found_inf
        )
        return
    _registry.select(STEP_SCALARS, scalars.device)(
        scalars, steps, partials, max_norm=limit, grad_scale=grad_scale, found_inf=found_inf
    )


def adamw_step_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor] | None,
    steps: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    cache: AddressTable | None = None,
) -> None:
    """Clip and update in one pass over memory; gradients are read, never rewritten.

    ``g = grads * multiplier``; ``m += (g - m)(1 - beta1)``; ``v = v beta2 + g g (1 - beta2)``;
    ``p = p (1 - lr wd) - lr/(1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``.

    Args:
        params: fp32, bf16 or fp16, dense; mutated.
        grads: Same shapes and strides, any of the three dtypes.
        exp_avgs: First moments, any of the three dtypes; mutated.
        exp_avg_sqs: Second moments, dtype of ``exp_avgs``; mutated.
        max_exp_avg_sqs: Largest second moments (amsgrad), mutated; None without amsgrad.
        steps: fp32 scalars, already counting this step (see :func:`step_scalars_`).
        scalars: The block written by :func:`step_scalars_`; its skip flag leaves everything as it was.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        maximize: Ascend instead of descend.
        cache: Table kept from the last call with the same operands.

    Numerics:
        fp32 arithmetic, one IEEE rounding per operation, no fused multiply-add; scalars formed in fp64. Same bits on
        every backend.

    Source:
        Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.
    """
    if torch.compiler.is_compiling():
        torch.ops.gradkern.adamw_step_.default(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(max_exp_avg_sqs or ()),
            list(steps),
            scalars,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )
        increment_version(params)
    else:
        operands = adamw_operands(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, cache=cache)
        adamw_step_of_(operands, scalars, AdamWHyper(lr, beta1, beta2, eps, weight_decay, maximize))


def adamw_operands(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor] | None,
    steps: Sequence[torch.Tensor],
    *,
    cache: AddressTable | None = None,
) -> Operands:
    """The checked operands of :func:`adamw_step_of_`; arguments as in :func:`adamw_step_`."""
    columns = dict(zip(ADAMW_COLUMNS, (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps), strict=True))
    return Operands(ADAMW_STEP.name, columns, cache)


def adamw_step_of_(operands: Operands, scalars: torch.Tensor, hyper: AdamWHyper) -> None:
    """As :func:`adamw_step_`, on operands made by :func:`adamw_operands`."""
    _registry.select(ADAMW_STEP, scalars.device)(operands, scalars, hyper)
    increment_version(operands["params"])
