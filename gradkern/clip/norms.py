"""Gradient norms and clipping with the signatures of ``torch.nn.utils``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch

from gradkern import functional
from gradkern.ops._chunks import DTYPE_CODES, kernel_can_read
from gradkern.ops.step_scalars import reference as scalar_layout

__all__ = ["clip_grad_norm_", "get_total_norm", "norm_of_order"]

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_dtype, _device, _layout = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")


def get_total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    any_cut: bool = False,
) -> torch.Tensor:
    """Norm of all elements of all tensors together; like ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: A tensor or an iterable of them. Empty: the norm is 0.
        norm_type: Order of the norm, also ``inf`` or ``"inf"``. Of fp32, bf16 and fp16 tensors on one device, orders 1,
            2 and inf run our kernels where the tensors are dense, and any other order torch's, in fp64. The rest
            (fp64, complex, sparse, several devices) is left to torch. As in torch, the norm of order 0 is the number of
            tensors that are not all zero.
        error_if_nonfinite: Raise where the norm is NaN or infinite (synchronises with a GPU). Default False.
        foreach: Accepted as in torch; only used where everything is left to torch.
        any_cut: Give an L2 norm whose bits do not depend on how the elements are cut into tensors. Default False: they
            do not depend on cuts at multiples of 4,096 elements.

    Returns:
        0-dim tensor; fp32 for fp32, bf16 and fp16 (torch returns the dtype of the tensors).

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
        ValueError: ``any_cut`` with another order than 2, or with tensors that are left to torch.

    Numerics:
        Relative error below 1e-7 to the true norm for orders 1, 2 and inf, no overflow unless the norm itself is beyond
        fp32, and the same bits for any order of tensors, number of threads and backend: squares and magnitudes are
        exact in fp64, added in a fixed tree per chunk of 4,096 and exactly across chunks. With ``any_cut`` squares are
        added exactly from the first to the last. (torch sums in fp32: relative error 1e-4 at 42 M elements, inf at
        1e20.) Other orders have the accuracy of fp64 and torch's order of additions.

    Note:
        Does not synchronise unless ``error_if_nonfinite`` is set.
    """
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    order = float(norm_type)
    _check_any_cut("get_total_norm", tensors, order, any_cut)
    if not _ours(tensors):
        return torch.nn.utils.get_total_norm(tensors, order, error_if_nonfinite, foreach)
    norm, _ = _norm_and_multiplier(tensors, order, math.inf, any_cut)
    return _checked(norm, order, error_if_nonfinite)


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    any_cut: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their total norm is at most ``max_norm``, as ``torch.nn.utils`` does.

    An optimizer of gradkern with ``max_norm=`` does the same without this pass over the gradients.

    Args:
        parameters: A tensor or an iterable of them; those without a gradient are passed over.
        max_norm: Threshold, at least 0.
        norm_type: Order of the norm, as in :func:`get_total_norm`.
        error_if_nonfinite: Raise, before anything is scaled, where the norm is NaN or infinite. Default False.
        foreach: Accepted as in torch; only used where everything is left to torch.
        any_cut: As in :func:`get_total_norm`: the scaled gradients are the same however parameters are sharded.

    Returns:
        The norm before clipping, as from :func:`get_total_norm`.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
        ValueError: As :func:`get_total_norm`.

    Numerics:
        ``grad *= min(1, max_norm / (norm + 1e-6))``; the coefficient is formed in fp64 and rounded once to fp32.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    order = float(norm_type)
    _check_any_cut("clip_grad_norm_", grads, order, any_cut)
    if not _ours(grads):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, order, error_if_nonfinite, foreach)
    norm, multiplier = _norm_and_multiplier(grads, order, float(max_norm), any_cut)
    _checked(norm, order, error_if_nonfinite)
    with torch.no_grad():
        for grad in grads:
            grad.mul_(multiplier)
    return norm


def _ours(tensors: list[torch.Tensor]) -> bool:
    """Whether the norm is formed here: plain strided tensors of the dtypes that kernels store, on one device."""
    if torch.compiler.is_compiling():
        return bool(tensors) and all(_is_plain(t) and t.device == tensors[0].device for t in tensors)
    # By way of map(), which is not traced: looking at thousands of tensors costs more than their norm.
    return (
        bool(tensors)
        and set(map(type, tensors)) <= _PLAIN
        and set(map(_layout, tensors)) == {torch.strided}
        and set(map(_dtype, tensors)) <= DTYPE_CODES.keys()
        and len(set(map(_device, tensors))) == 1
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided
    return plain and tensor.dtype in DTYPE_CODES


def _check_any_cut(name: str, tensors: list[torch.Tensor], order: float, any_cut: bool) -> None:
    if not any_cut:
        return
    if order != 2.0:
        raise ValueError(f"{name}: any_cut is for the L2 norm, got norm_type {order}, expected 2; leave any_cut out")
    for i, t in enumerate(tensors):
        if not _is_plain(t) or t.device != tensors[0].device:
            raise ValueError(
                f"{name}: any_cut sums plain fp32, bf16 and fp16 tensors on one device, but number {i} is a "
                f"{type(t).__name__} of {t.dtype}, {t.layout}, on {t.device}; convert it or leave any_cut out"
            )


def _norm_and_multiplier(
    tensors: list[torch.Tensor], order: float, max_norm: float, any_cut: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm and the coefficient that clips it, both 0-dim fp32."""
    if any(t.requires_grad for t in tensors):
        tensors = [t.detach() for t in tensors]
    if order == 2.0:
        scalars = _scalars([_l2_partials(same, any_cut) for same in _by_dtype(tensors)], max_norm)
        return scalars[scalar_layout.NORM].float(), scalars[scalar_layout.GRAD_MULTIPLIER].float()
    if order == 1.0:
        # The root that step_scalars_ takes is squared again: two roundings of fp64, and no host read on a GPU.
        root = _scalars([functional.abs_norm(same) for same in _by_dtype(tensors)], math.inf)[scalar_layout.NORM]
        norm = root * root
    elif order == math.inf:
        maxima = torch.cat([functional.abs_norm(same, maximum=True) for same in _by_dtype(tensors)])
        norm = maxima.amax() if maxima.numel() else maxima.new_zeros(())
    else:
        norms = torch.stack([torch.linalg.vector_norm(t, order, dtype=torch.float64) for t in tensors])
        norm = torch.linalg.vector_norm(norms, order)
    # Tensor by tensor: a number divided by a tensor is multiplied by its reciprocal.
    multiplier = (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
    return norm.float(), multiplier.float()


def _by_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Lists of one dtype, of tensors that kernels can read; what has gaps or overlaps is copied."""
    readable = tensors
    if not all(t.is_contiguous() for t in tensors):
        readable = [t if kernel_can_read(t) else t.contiguous() for t in tensors]
    return [same for dtype in DTYPE_CODES if (same := [t for t in readable if t.dtype == dtype])]


def _l2_partials(tensors: list[torch.Tensor], any_cut: bool) -> torch.Tensor:
    return functional.exact_partials(functional.sumsq_exact(tensors)) if any_cut else functional.sumsq(tensors)


def _scalars(partials: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    scalars = functional.new_scalars(partials[0].device)
    functional.step_scalars_(scalars, [], partials, max_norm=max_norm)
    return scalars


def _checked(norm: torch.Tensor, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({norm.item()}), "
            "expected a finite number, so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    return norm


def norm_of_order(tensors: Sequence[torch.Tensor], order: float) -> torch.Tensor:
    """Norm of any order over all elements: 0-dim fp64."""
    wide = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    norms = [
        torch.linalg.vector_norm(t, order, dtype=torch.complex128 if t.is_complex() else torch.float64) for t in wide
    ]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms).double(), order)
    return total
