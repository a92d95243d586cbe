"""Gradient accumulation in fp32 for people who keep their own optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import cast

import torch

from gradkern import functional
from gradkern.grad_fold import GradFold, fold_list_, known_partials
from gradkern.ops._chunks import DTYPE_CODES, kernel_can_read
from gradkern.ops._table import AddressTable
from gradkern.ops.step_scalars import reference as scalar_layout

__all__ = ["GradAccumulator"]


_grad, _shape, _dtype, _device = map(attrgetter, ("grad", "shape", "dtype", "device"))


class GradAccumulator:
    """Accumulates micro-batch gradients in fp32 and keeps their norm current, with any optimizer.

    While it is attached, ``backward()`` folds every gradient into an fp32 ``p.grad``: for fp32 parameters that is what
    autograd does anyway, one pass cheaper with the norm; bf16 and fp16 parameters get an fp32 gradient
    (``p.grad_dtype`` is set to None for them), so that many small micro-batches are not lost to rounding. The first
    micro-batch after :meth:`zero_grad` overwrites, nothing is ever zeroed.

    Args:
        params: Parameters; those with ``requires_grad=False`` are passed over.

    Raises:
        ValueError: No parameter requires grad, one is of a dtype other than fp32, bf16 and fp16, or another
            accumulator or gradkern optimizer already folds one; nothing is hooked then.

    Example:
        >>> import torch, gradkern as gk
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = gk.GradAccumulator(model.parameters())
        >>> for _ in range(4):
        ...     (model(torch.ones(2, 4)).sum() / 4).backward()
        >>> norm = accumulator.clip_grad_norm_(1.0)
        >>> accumulator.cast_grads_()
        >>> opt.step()
        >>> accumulator.zero_grad()
    """

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        self._params = [p for p in params if p.requires_grad]
        if not self._params:
            raise ValueError(
                "GradAccumulator: got no parameter that requires grad, expected at least one; pass model.parameters()"
            )
        for i, param in enumerate(self._params):
            if param.dtype not in DTYPE_CODES:
                raise ValueError(
                    f"GradAccumulator: params[{i}] has dtype {param.dtype}, expected one of "
                    f"{', '.join(map(str, DTYPE_CODES))}; leave it to autograd"
                )
            if not kernel_can_read(param) or param.device != self._params[0].device:
                raise ValueError(
                    f"GradAccumulator: params[{i}] is a {type(param).__name__} on {param.device}, stride "
                    f"{param.stride()}, expected plain dense parameters on {self._params[0].device}; use one "
                    "accumulator per device and leave the rest to autograd"
                )
        self._fold = GradFold(self._params, "GradAccumulator")
        self._low_precision = [p for p in self._params if p.dtype != torch.float32]
        for param in self._low_precision:
            param.grad_dtype = None
        self._fold_caches: dict[tuple[torch.dtype, bool], AddressTable] = {}

    @property
    def grads(self) -> list[torch.Tensor]:
        """The accumulated gradients, fp32, of the parameters that have one."""
        return [p.grad for p in self._params if p.grad is not None]

    def accumulate_(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Fold gradients obtained elsewhere (``torch.autograd.grad``, another process), in one launch per dtype.

        Args:
            grads: One per parameter, of its shape, fp32, bf16 or fp16; None passes a parameter over.

        Raises:
            ValueError: Another number of gradients than of parameters, or one of another shape, layout or dtype than a
                parameter's gradient can have; nothing is folded then.
        """
        if len(grads) != len(self._params):
            raise ValueError(
                f"GradAccumulator.accumulate_: got {len(grads)} gradients, expected {len(self._params)}, one per "
                "parameter; pass None where there is none"
            )
        shown = list(map(_grad, self._params))
        if True not in map(is_, chain(grads, shown), repeat(None)):
            # Every parameter shows a gradient and gets another: mostly one launch, which checks its operands itself.
            given, accumulated = cast("Sequence[torch.Tensor]", grads), cast("list[torch.Tensor]", shown)
            dtypes = set(map(_dtype, given))
            if len(dtypes) == 1 and set(map(_dtype, accumulated)) == {torch.float32}:
                cache = self._fold_caches.setdefault((*dtypes, False), AddressTable())
                fold_list_(accumulated, given, overwrite=False, cache=cache)
                return
        pairs = [(p, g) for p, g in zip(self._params, grads, strict=True) if g is not None]
        self._check_pairs(pairs)
        for dtype in dict.fromkeys(g.dtype for _, g in pairs):
            fresh = [(p, g) for p, g in pairs if g.dtype == dtype and p.grad is None]
            present = [(p, g) for p, g in pairs if g.dtype == dtype and p.grad is not None]
            self._fold_list(fresh, dtype, overwrite=True)
            self._fold_list(present, dtype, overwrite=False)

    def norm(self) -> torch.Tensor:
        """L2 norm of the accumulated gradients, 0-dim fp32; free where they were folded. Does not synchronise.

        Edits that bump no version (``GradScaler.unscale_``, collectives, ``.data``, numpy) are not noticed here;
        :meth:`clip_grad_norm_` and ``gradkern.get_total_norm`` read the gradients themselves.
        """
        listed = known_partials(self.grads)
        scalars = functional.new_scalars(self._params[0].device)
        if listed is None:
            scalars = self._scalars(math.inf, self._known())
        else:
            functional.step_scalars_(scalars, [], [listed])
        return scalars[scalar_layout.NORM].float()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the accumulated gradients in place so that their norm is at most ``max_norm``.

        Args:
            max_norm: Threshold, at least 0.

        Returns:
            The norm before clipping, 0-dim fp32.
        """
        scalars = self._scalars(float(max_norm), [])
        multiplier = scalars[scalar_layout.GRAD_MULTIPLIER].float()
        for grad in self.grads:
            grad.mul_(multiplier)
        return scalars[scalar_layout.NORM].float()

    def cast_grads_(self) -> None:
        """Show the gradients of bf16 and fp16 parameters in their own dtype, for optimizers that insist on it."""
        for param in self._low_precision:
            if param.grad is not None:
                param.grad = param.grad.to(param.dtype)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients without touching memory: the next micro-batch overwrites."""
        for param in self._params:
            param.grad = None

    def detach(self) -> None:
        """Remove every hook and give autograd the gradients of all parameters back."""
        self._fold.detach()
        for param in self._low_precision:
            if param.grad is not None:
                param.grad = param.grad.to(param.dtype)
            param.grad_dtype = param.dtype

    def _check_pairs(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        params, grads = [p for p, _ in pairs], [g for _, g in pairs]
        if (
            list(map(_shape, grads)) == list(map(_shape, params))
            and all(map(torch.Tensor.is_contiguous, params))
            and all(map(torch.Tensor.is_contiguous, grads))
            and set(map(_dtype, grads)) <= DTYPE_CODES.keys()
            and set(map(_device, grads)) <= {self._params[0].device}
        ):
            return
        for i, (param, grad) in enumerate(pairs):
            fits = grad.shape == param.shape and grad.stride() == param.stride() and grad.device == param.device
            if not fits or grad.dtype not in DTYPE_CODES:
                raise ValueError(
                    f"GradAccumulator.accumulate_: gradient {i} is {grad.dtype} of shape {tuple(grad.shape)}, stride "
                    f"{grad.stride()} on {grad.device}, expected fp32, bf16 or fp16 laid out as its parameter: shape "
                    f"{tuple(param.shape)}, stride {param.stride()} on {param.device}"
                )

    def _fold_list(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, *, overwrite: bool
    ) -> None:
        if not pairs:
            return
        params = [p for p, _ in pairs]
        for param in params:
            if param.grad is not None and param.grad.dtype != torch.float32:
                param.grad = param.grad.float()  # as cast_grads_() or autograd left it
        main_grads: list[torch.Tensor] = [self._fold.fresh_main_grad(p) if p.grad is None else p.grad for p in params]
        cache = self._fold_caches.setdefault((dtype, overwrite), AddressTable())
        fold_list_(main_grads, [g for _, g in pairs], overwrite=overwrite, cache=cache)
        if overwrite:
            for param, main_grad in zip(params, main_grads, strict=True):
                param.grad = main_grad

    def _known(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(gradient, partials)`` of every parameter whose gradient is as a hook left it."""
        known = []
        for param in self._params:
            partials = None if param.grad is None else self._fold.partials(param, param.grad)
            if param.grad is not None and partials is not None:
                known.append((param.grad, partials))
        return known

    def _scalars(self, max_norm: float, known: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        grads = self.grads
        settled = {id(grad) for grad, _ in known}
        partials = [partials for _, partials in known]
        rest: dict[torch.dtype, list[torch.Tensor]] = {}
        for grad in grads:
            if id(grad) not in settled:
                rest.setdefault(grad.dtype, []).append(grad)
        partials.extend(functional.sumsq(same) for same in rest.values())
        scalars = functional.new_scalars(self._params[0].device)
        functional.step_scalars_(scalars, [], partials, max_norm=max_norm)
        return scalars
