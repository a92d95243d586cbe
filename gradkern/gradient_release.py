"""Gradients given up during backward: kept in 8-bit blocks until the step, clipped by their exact norm."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gradkern import functional
from gradkern.grad_fold import distributed
from gradkern.ops._chunks import DTYPE_CODES, kernel_can_read
from gradkern.ops._step.codecs import state_blocks
from gradkern.ops._step.random import key_of
from gradkern.ops._table import AddressTable
from gradkern.ops.step_scalars import reference as scalar_layout

__all__ = ["GradientRelease"]

# Which object releases a gradient: the first of two would leave none to the second.
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()

_SCRATCH_SHARE = 32
"""What the step decodes at once is this part of all gradients in fp32, or one gradient where that is more."""


@dataclass(slots=True)
class _Stashed:
    """One gradient in 8-bit blocks, and the sums of squares of what it was."""

    codes: torch.Tensor
    exponents: torch.Tensor
    partials: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.exponents.nbytes


class GradientRelease:
    """Frees every gradient in backward as soon as it is final, and still clips by the exact global norm.

    While it is attached, a gradient that arrives in ``p.grad`` is put away in 8-bit blocks (1.016 bytes an element) and
    freed, so that backward never holds more than a quarter of the fp32 gradients and the one that arrives. The sum of
    squares is taken of the gradient as it came: the norm is that of :func:`gradkern.get_total_norm`, bit for bit.
    :meth:`step` clips, then hands the gradients back to the optimizer a few parameters at a time.

    The update is *not* that of the full gradients bit for bit: each element has lost all but 3 mantissa bits, by
    stochastic rounding whose mean is the gradient, and what is below 2**-14 of the largest of its 64 neighbours tends
    to zero. Everything is reproducible: the random bits depend on seed, step, parameter and position.

    One backward a step: micro-batches are for :class:`gradkern.GradAccumulator`. ``torch.amp.GradScaler`` finds no
    gradients to unscale, and a closure would find none either; neither is supported, nor are several processes.
    ``optimizer.step`` runs several times a step, hooks on it as often.

    Args:
        optimizer: Any, of gradkern or of torch, which treats parameters one by one and does not clip by itself.
        max_norm: Threshold of the global L2 norm, as in ``torch.nn.utils.clip_grad_norm_``; default None measures only.
        skip_nonfinite: Leave parameters and state as they are where the norm is NaN or infinite; reads the norm on the
            host. Default False, as in torch.
        seed: Of the random bits, 0 <= seed < 2**53.

    Attributes:
        optimizer: As given.
        max_norm: Threshold; may be changed between steps.
        peak_grad_bytes: The most bytes of gradients that were there at once so far: those put away, the one that
            arrives, those handed back. At most 0.3 times the fp32 gradients where no parameter holds more than 4 % of
            all elements; one that autograd has computed but not delivered yet is not seen.

    Raises:
        ValueError: ``max_norm`` or ``seed`` is out of range, no parameter requires grad, one has a gradient already, is
            not plain dense fp32, bf16 or fp16, or on another device than the rest, is released by another object, or
            the optimizer clips or skips by itself; nothing is hooked then.

    Example:
        >>> import torch, gradkern as gk
        >>> model = torch.nn.Linear(4, 1)
        >>> release = gk.GradientRelease(gk.AdamW(model.parameters()), max_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> norm = release.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if max_norm is not None and not max_norm >= 0.0:
            raise ValueError(
                f"GradientRelease: max_norm must be at least 0 (None measures without clipping), got {max_norm}"
            )
        if not 0 <= seed < 1 << 53:
            raise ValueError(f"GradientRelease: seed must be at least 0 and below 2**53, got {seed}")
        if getattr(optimizer, "clip", None) is not None or getattr(optimizer, "skip_nonfinite", False):
            raise ValueError(
                f"GradientRelease: got a {type(optimizer).__name__} that clips or skips by itself, which would see a "
                "few gradients at a time; make it without and pass max_norm and skip_nonfinite to GradientRelease"
            )
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.peak_grad_bytes = 0
        self._skip_nonfinite = skip_nonfinite
        self._seed = seed
        self._steps = 0
        self._params = [p for p in _params_of(optimizer) if p.requires_grad]
        self._check_params()
        self._device = self._params[0].device
        self._stash: dict[int, _Stashed] = {}
        self._held_bytes = 0
        self._caches = [AddressTable() for _ in self._params]
        self._scalars = functional.new_scalars(self._device)
        self._stepping = False
        me = weakref.ref(self)
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(_hook(me, index)) for index, param in enumerate(self._params)
        ]
        for param in self._params:
            _OWNERS[param] = me
        self._handles.append(optimizer.register_step_pre_hook(_guard(me)))

    # --- public -----------------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> torch.Tensor:
        """L2 norm of the gradients of the last step before clipping, 0-dim fp32; 0 before the first."""
        return self._scalars[scalar_layout.NORM].float()

    @property
    def held_grad_bytes(self) -> int:
        """Bytes of the gradients that wait for the step."""
        return self._held_bytes

    def step(self) -> torch.Tensor:
        """Clip by the global norm and update, a few parameters at a time; nothing is put away any more then.

        Returns:
            The norm before clipping, 0-dim fp32 on the device of the parameters; 0 where there was no gradient.

        Raises:
            RuntimeError: A parameter of the optimizer has a ``p.grad``, which nobody released: it was added or attached
                later; nothing has been changed then.
        """
        left = next((p for p in _params_of(self.optimizer) if p.grad is not None), None)
        if left is not None:
            raise RuntimeError(
                f"GradientRelease.step: a parameter of shape {tuple(left.shape)} has a p.grad that was not released, "
                "expected None; call detach() and make GradientRelease anew after add_param_group(), or set p.grad to "
                "None"
            )
        partials = [self._stash[index].partials for index in sorted(self._stash)]
        functional.step_scalars_(self._scalars, [], partials, max_norm=self.max_norm)
        norm = self.grad_norm
        if self._skip_nonfinite and not math.isfinite(float(norm)):
            self.zero_grad()
            return norm
        multiplier = self._scalars[scalar_layout.GRAD_MULTIPLIER].float()
        self._stepping = True
        try:
            for batch in self._batches():
                self._step_batch(batch, multiplier)
        finally:
            self._stepping = False
        self._steps += 1
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients that wait for the step; after a step there are none."""
        self._stash.clear()
        self._held_bytes = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to round alike: the number of steps. Gradients are not saved."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._steps = int(state_dict["steps"])

    def detach(self) -> None:
        """Remove every hook and forget what waits; gradients stay in ``p.grad`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param in self._params:
            _OWNERS.pop(param, None)
        self.zero_grad()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- internals --------------------------------------------------------------------------------------------------

    def _check_params(self) -> None:
        if not self._params:
            raise ValueError(
                "GradientRelease: got an optimizer without a parameter that requires grad, expected at least one"
            )
        device = self._params[0].device
        for i, param in enumerate(self._params):
            if not kernel_can_read(param) or param.device != device:
                raise ValueError(
                    f"GradientRelease: parameter {i} is a {type(param).__name__} of dtype {param.dtype} on "
                    f"{param.device}, stride {param.stride()}, expected plain dense {', '.join(map(str, DTYPE_CODES))} "
                    f"on {device}; give it an optimizer of its own"
                )
            if param.grad is not None:
                raise ValueError(
                    f"GradientRelease: parameter {i} has a gradient already, expected None; step and call zero_grad() "
                    "first"
                )
            owner = _OWNERS.get(param)
            if owner is not None and owner() is not None:
                raise ValueError(
                    f"GradientRelease: the gradient of parameter {i} is already released by another object, expected "
                    "one owner; call detach() on the other first"
                )

    def _arrived(self, index: int, param: torch.Tensor) -> None:
        """Put a final gradient away; on an error the parameter shows none, and what waits is as it was."""
        grad = param.grad
        if grad is None:
            return
        param.grad = None
        if distributed():
            raise RuntimeError(
                "GradientRelease: torch.distributed is initialised, expected one process: a gradient given up here "
                "would never be averaged with the others; use GradAccumulator"
            )
        if index in self._stash:
            raise RuntimeError(
                f"GradientRelease: a second gradient for a parameter of shape {tuple(param.shape)} arrived before "
                "step(), expected one backward a step; call step() or zero_grad() first, or accumulate micro-batches "
                "with GradAccumulator"
            )
        if not kernel_can_read(grad):
            raise RuntimeError(
                f"GradientRelease: the gradient of a parameter of shape {tuple(param.shape)} is a "
                f"{type(grad).__name__} of dtype {grad.dtype} and layout {grad.layout}, expected plain dense "
                f"{', '.join(map(str, DTYPE_CODES))}; leave it to an optimizer of its own"
            )
        grad = grad.detach()
        codes = torch.empty_like(grad, dtype=torch.uint8)
        exponents = torch.empty(state_blocks(grad.numel()), dtype=torch.uint8, device=grad.device)
        key = key_of(self._seed, self._steps, index)
        partials = functional.stash_([grad], [codes], [exponents], [key], cache=self._caches[index])
        self._stash[index] = stashed = _Stashed(codes, exponents, partials)
        self._held_bytes += stashed.nbytes
        self._note_peak(grad.nbytes)

    def _note_peak(self, beside: int) -> None:
        self.peak_grad_bytes = max(self.peak_grad_bytes, self._held_bytes + beside)

    def _batches(self) -> Iterator[list[int]]:
        """Parameters of one dtype, in order, whose gradients may be there at once."""
        room = 4 * sum(p.numel() for p in self._params) // _SCRATCH_SHARE
        batch: list[int] = []
        filled = 0
        for index in sorted(self._stash, key=lambda i: (str(self._params[i].dtype), i)):
            param = self._params[index]
            if batch and (filled + param.nbytes > room or param.dtype != self._params[batch[0]].dtype):
                yield batch
                batch, filled = [], 0
            batch.append(index)
            filled += param.nbytes
        if batch:
            yield batch

    def _step_batch(self, batch: list[int], multiplier: torch.Tensor) -> None:
        params = [self._params[i] for i in batch]
        stashed = [self._stash[i] for i in batch]
        grads = [torch.empty_like(s.codes, dtype=p.dtype) for p, s in zip(params, stashed, strict=True)]
        self._note_peak(sum(g.nbytes for g in grads))
        functional.unstash_(grads, [s.codes for s in stashed], [s.exponents for s in stashed], multiplier)
        try:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            self.optimizer.step()
        finally:
            for param in params:
                param.grad = None
        for index in batch:  # only now: an optimizer that raises at the first of them has cost no gradient
            self._held_bytes -= self._stash.pop(index).nbytes

    def _check_called_by_me(self) -> None:
        if self._stash and not self._stepping:
            raise RuntimeError(
                "GradientRelease: optimizer.step() was called while gradients wait in 8-bit blocks, where it does not "
                "find them; call step() of the GradientRelease instead"
            )


def _params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _hook(release: weakref.ref[GradientRelease], index: int) -> Callable[[torch.Tensor], None]:
    # A parameter outlives who released its gradients, so its hook must not hold them.
    def arrived(param: torch.Tensor) -> None:
        owner = release()
        if owner is not None:
            owner._arrived(index, param)

    return arrived


def _guard(release: weakref.ref[GradientRelease]) -> Callable[..., None]:
    def check(*_: object) -> None:
        owner = release()
        if owner is not None:
            owner._check_called_by_me()

    return check
