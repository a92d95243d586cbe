"""Stateless functions over lists of tensors: the only module that calls ops.

Eager calls pass a table of addresses straight to the chosen backend; traced calls (``torch.compile``) go through one
registered op. Both run the same kernels. Mutated tensors get their version counter bumped, which kernels that write
through addresses do not do by themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.autograd.graph import increment_version

from gradkern.ops import _registry
from gradkern.ops._chunks import CHUNK, DTYPE_CODES, chunk_count
from gradkern.ops._step.codecs import ParamCodec, StateCodec
from gradkern.ops._step.columns import step_operands
from gradkern.ops._step.rule import Codecs
from gradkern.ops._step.spec import StepOp, list_names
from gradkern.ops._table import AddressTable, Operands
from gradkern.ops.abs_norm.spec import SPEC as ABS_NORM
from gradkern.ops.accumulate.spec import ROLES as ACCUMULATE_ROLES
from gradkern.ops.accumulate.spec import SPEC as ACCUMULATE
from gradkern.ops.stash.spec import ROLES as STASH_ROLES
from gradkern.ops.stash.spec import SPEC as STASH
from gradkern.ops.step_scalars import reference as scalar_layout
from gradkern.ops.step_scalars.spec import SPEC as STEP_SCALARS
from gradkern.ops.sumsq.spec import SPEC as SUMSQ
from gradkern.ops.sumsq_exact import reference as exact_layout
from gradkern.ops.sumsq_exact.reference import exact_partials
from gradkern.ops.sumsq_exact.spec import SPEC as SUMSQ_EXACT
from gradkern.ops.unstash.spec import ROLES as UNSTASH_ROLES
from gradkern.ops.unstash.spec import SPEC as UNSTASH

__all__ = [
    "abs_norm",
    "accumulate_",
    "accumulate_with_partials_",
    "count_steps_",
    "exact_partials",
    "new_partials",
    "new_scalars",
    "stash_",
    "step_",
    "step_of_",
    "step_operands",
    "step_scalars_",
    "sumsq",
    "sumsq_exact",
    "sumsq_of",
    "sumsq_units",
    "unstash_",
]


def new_partials(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised fp64 tensor with room for one partial per chunk of ``tensors``."""
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(sum(chunk_count(t.numel()) for t in tensors), dtype=torch.float64, device=device)


def new_scalars(device: torch.device) -> torch.Tensor:
    """A zeroed fp64 block for :func:`step_scalars_`; ``gradkern.ops.step_scalars.reference`` names its positions."""
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


def sumsq_units(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Sum of squares of every unit of consecutive elements, as of the rows of a matrix.

    Args:
        tensors: fp32, bf16 or fp16, all of one dtype and device, dense; units are cut in memory order.
        sizes: Elements in a unit, by tensor; each at least 1 and a divisor of its tensor's elements.

    Returns:
        fp64, shape ``(units,)``, in order of tensors.

    Numerics:
        A unit is cut into chunks from its own first element, each summed as by :func:`sumsq`; the sums of its chunks
        are added in order. Same bits on every backend.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    operands = Operands.of_units(SUMSQ.name, "tensors", tensors, sizes)
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=tensors[0].device)
    _registry.select(SUMSQ, partials.device)(operands, partials)
    if max(sizes) <= CHUNK:
        return partials
    counts = tuple(t.numel() // size for t, size in zip(tensors, sizes, strict=True))
    first, more = _chunks_of_units(tuple(sizes), counts, partials.device)
    sums = partials[first]
    for units, places in more:  # one order of additions everywhere
        sums[units] += partials[places]
    return sums


@functools.lru_cache(maxsize=64)
def _chunks_of_units(
    sizes: tuple[int, ...], counts: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The first partial of every unit; then, as often as a unit has more, which units and which partials."""
    chunks = np.repeat(np.array(list(map(chunk_count, sizes))), counts)
    first = np.cumsum(chunks) - chunks
    more = []
    for k in range(1, int(chunks.max())):
        units = np.flatnonzero(chunks > k)
        more.append((torch.from_numpy(units).to(device), torch.from_numpy(first[units] + k).to(device)))
    return torch.from_numpy(first).to(device), more


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
        operands = Operands(ACCUMULATE.name, {"main_grads": main_grads, "grads": grads}, cache, roles=ACCUMULATE_ROLES)
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
    operands = Operands(ACCUMULATE.name, {"main_grads": main_grads, "grads": grads}, cache, roles=ACCUMULATE_ROLES)
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(ACCUMULATE, partials.device)(operands, partials, overwrite=overwrite)
    increment_version(main_grads)
    return partials


def stash_(
    grads: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    exponents: Sequence[torch.Tensor],
    keys: Sequence[int],
    *,
    cache: AddressTable | None = None,
) -> torch.Tensor:
    """Put gradients away in 8-bit blocks: a byte an element, and one exponent for every 64 elements.

    Args:
        grads: fp32, bf16 or fp16, one dtype, dense.
        codes: uint8, laid out as the gradients; overwritten.
        exponents: uint8, one per block of 64 elements in memory order, contiguous; overwritten.
        keys: One per gradient, 0 <= key < 2**32: what the random words of its rounding depend on beside the position.
        cache: Table kept from the last call with the same operands.

    Returns:
        The partials of the gradients as they came, as :func:`sumsq` gives them, from the same pass over memory.

    Numerics:
        A code has a sign, 4 exponent and 3 mantissa bits. Rounding is stochastic, so that the mean of what
        :func:`unstash_` gives back is the gradient; below 2**-14 of the largest of a block it tends to zero. Numbers
        that are not finite stay what they are.
    """
    if torch.compiler.is_compiling():
        partials = new_partials(grads)
        torch.ops.gradkern.stash_.default(list(grads), list(codes), list(exponents), partials, list(keys))
        return partials
    operands = Operands(
        STASH.name,
        {"grads": grads, "codes": codes, "exponents": exponents, "keys": keys},
        cache,
        roles=STASH_ROLES,
    )
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(STASH, partials.device)(operands, partials)
    increment_version([*codes, *exponents])
    return partials


def unstash_(
    grads: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    exponents: Sequence[torch.Tensor],
    multiplier: torch.Tensor,
    *,
    cache: AddressTable | None = None,
) -> None:
    """Take gradients out of their 8-bit blocks, times a multiplier.

    Args:
        grads: fp32, bf16 or fp16, one dtype, dense; overwritten.
        codes: As :func:`stash_` left them.
        exponents: The same.
        multiplier: 0-dim fp32, on the device of the gradients.
        cache: Table kept from the last call with the same operands.

    Numerics:
        One fp32 multiplication per element, then one rounding where the gradients are narrower.
    """
    if torch.compiler.is_compiling():
        torch.ops.gradkern.unstash_.default(list(grads), list(codes), list(exponents), multiplier)
    else:
        columns = {"grads": grads, "codes": codes, "exponents": exponents}
        operands = Operands(UNSTASH.name, columns, cache, roles=UNSTASH_ROLES)
        _registry.select(UNSTASH, operands.device())(operands, multiplier)
    increment_version(grads)


def step_scalars_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    *,
    grads: Operands | Sequence[Operands] = (),
    column: str = "grads",
    grad_partials: Sequence[torch.Tensor] | None = None,
    max_norm: float | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    skip_nonfinite: bool = False,
) -> list[torch.Tensor]:
    """Finish the norm, form the scalars of a step and count it: one launch on a GPU, without synchronising.

    Args:
        scalars: fp64, shape ``(6,)``; norm, gradient multiplier, skip flag and clip coefficient are overwritten, the
            number of steps skipped so far gains one when this one is.
        steps: fp32 step counters; each gains one unless the step is skipped.
        partials: fp64 partials of gradients that are normed already, by :func:`sumsq` or :func:`accumulate_`.
        grads: Operands with gradients that are not; each further table is a launch of its own.
        column: Name of the gradients in these operands.
        grad_partials: fp64, shape ``(chunks,)``, one per table in ``grads``; overwritten. New tensors when None.
        max_norm: Threshold of the L2 norm; None does not clip.
        grad_scale: 0-dim loss scale that gradients still carry.
        found_inf: 0-dim; non-zero skips the step.
        skip_nonfinite: Skip the step too where the norm is NaN or infinite.

    Returns:
        The partials of every table in ``grads``, as :func:`sumsq` gives them.

    Numerics:
        All partials are summed exactly, so the norm does not depend on their order, nor on which were known.
    """
    limit = math.inf if max_norm is None else max_norm
    if scalars.dtype != torch.float64 or scalars.shape != (scalar_layout.SIZE,) or not scalars.is_contiguous():
        raise ValueError(
            f"step_scalars_: scalars is {scalars.dtype} of shape {tuple(scalars.shape)}, expected contiguous fp64 of "
            f"shape ({scalar_layout.SIZE},); make it with new_scalars"
        )
    tables = [grads] if isinstance(grads, Operands) else list(grads)
    if grad_partials is None:
        sums = [torch.empty(table.cache.chunks, dtype=torch.float64, device=scalars.device) for table in tables]
    else:
        sums = list(grad_partials)
        chunks = [table.cache.chunks for table in tables]
        if [block.numel() for block in sums] != chunks:
            raise ValueError(
                f"step_scalars_: grad_partials have {[block.numel() for block in sums]} elements, expected {chunks}, "
                "one per chunk of every table in grads; pass None to have them made"
            )
    for name, blocks, dtype in (
        ("steps", steps, torch.float32),
        ("partials", partials, torch.float64),
        ("grad_partials", sums, torch.float64),
    ):
        for i, block in enumerate(blocks):
            if block.dtype != dtype or block.device != scalars.device or not block.is_contiguous():
                raise ValueError(
                    f"step_scalars_: {name}[{i}] is {block.dtype} on {block.device}, stride {block.stride()}, expected "
                    f"contiguous {dtype} on {scalars.device}"
                )
    if torch.compiler.is_compiling():
        known = list(partials)
        for table, block in zip(tables, sums, strict=True):
            known.append(block.copy_(torch.ops.gradkern.sumsq.default(list(table[column]))))
        torch.ops.gradkern.step_scalars_.default(
            scalars,
            list(steps),
            known,
            [],
            max_norm=limit,
            grad_scale=grad_scale,
            found_inf=found_inf,
            skip_nonfinite=skip_nonfinite,
        )
        return sums
    _registry.select(STEP_SCALARS, scalars.device)(
        scalars,
        steps,
        partials,
        [scalar_layout.Unsummed(table, column, block) for table, block in zip(tables, sums, strict=True)],
        max_norm=limit,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skip_nonfinite=skip_nonfinite,
    )
    return sums


def count_steps_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    *,
    found_inf: torch.Tensor | None = None,
    skip_nonfinite: bool = False,
) -> None:
    """Set the skip flag of a block whose norm is known already, and count the step unless it is set.

    Args:
        scalars: fp64 block; its skip flag and its count of skipped steps are changed.
        steps: fp32 step counters.
        found_inf: 0-dim; non-zero skips the step.
        skip_nonfinite: Skip where the norm is not finite.
    """
    skip = torch.zeros_like(scalars[0]) if found_inf is None else (found_inf.reshape(()) != 0).double()
    if skip_nonfinite:
        skip = torch.maximum(skip, (~scalars[scalar_layout.NORM].isfinite()).double())
    scalars[scalar_layout.SKIP].copy_(skip)
    scalars[scalar_layout.SKIPPED].add_(skip)
    for block in steps:
        block.add_(1.0 - skip)


def step_(
    op: StepOp,
    tensors: Mapping[str, Sequence[torch.Tensor] | None],
    scalars: torch.Tensor,
    hyper: torch.Tensor,
    *,
    codecs: Codecs | None = None,
    variant: int = 0,
    ids: Sequence[int] | None = None,
    unit_sizes: Sequence[int] | None = None,
) -> None:
    """Clip and update in one pass over memory; gradients are read, never rewritten.

    Args:
        op: The optimizer's rule: ``STEP`` of ``gradkern.ops.adamw_step.spec`` and its like, which say what is computed.
        tensors: Lists of equal length by name: ``params`` and the states (``exp_avgs``, ...) are mutated, ``grads`` and
            ``steps`` (fp32 scalars, already counting this step) read; ``remainders``, ``units`` and block exponents
            where the codecs want them.
        scalars: The block written by :func:`step_scalars_`; its skip flag leaves everything as it was.
        hyper: fp64, the rule's hyper-parameters in its order, then the seed of stochastic rounding.
        codecs: How the operands are stored; None: as their dtypes say, without remainders or block exponents.
        variant: Of the rule.
        ids: Numbers of the parameters, for random words; default 0 for all.
        unit_sizes: Elements that share a multiplier, with ``units``.

    Raises:
        ValueError: Lists of unequal length or operands of unequal layout; nothing has been written.
        TypeError: A dtype that the codecs do not store.

    Numerics:
        fp32 arithmetic, one IEEE rounding per operation, no fused multiply-add; scalars formed in fp64. Same bits on
        every backend.
    """
    codecs = _codecs_of(tensors) if codecs is None else codecs
    if torch.compiler.is_compiling():
        params = list(tensors["params"] or ())
        lists = [list(tensors.get(name) or ()) for name in list_names(op.rule)]
        getattr(torch.ops.gradkern, op.spec.name).default(
            *lists,
            scalars,
            hyper,
            variant=variant,
            param_codec=int(codecs.param),
            state_codec=int(codecs.state),
            transform=int(codecs.transform),
            ids=list(ids or ()),
            unit_sizes=list(unit_sizes or ()),
        )
        increment_version(params)
        return
    integers = {name: numbers for name, numbers in (("ids", ids), ("unit_sizes", unit_sizes)) if numbers}
    step_of_(op, step_operands(op.rule, codecs, variant, tensors, integers), scalars, hyper, codecs, variant)


def _codecs_of(tensors: Mapping[str, Sequence[torch.Tensor] | None]) -> Codecs:
    def code(name: str) -> int:
        column = tensors.get(name)
        return DTYPE_CODES[column[0].dtype] if column else 0

    states = [name for name in tensors if name not in ("params", "grads", "steps", "remainders", "units")]
    return Codecs(ParamCodec(code("params")), code("grads"), StateCodec(code(states[0]) if states else 0))


def step_of_(
    op: StepOp, operands: Operands, scalars: torch.Tensor, hyper: torch.Tensor, codecs: Codecs, variant: int
) -> None:
    """As :func:`step_`, on operands made by ``step_operands``."""
    _registry.select(op.spec, scalars.device)(operands, scalars, hyper, codecs, variant)
    increment_version(operands["params"])
