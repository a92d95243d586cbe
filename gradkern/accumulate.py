"""Gradient accumulation in fp32 for people who keep their own optimizer."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from operator import attrgetter, eq, is_
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from gradkern import functional
from gradkern.grad_fold import GradFold, GradMeter, distributed, fold_list_, known_partials
from gradkern.ops._chunks import DTYPE_CODES, kernel_can_read, laid_alike
from gradkern.ops._table import AddressTable
from gradkern.ops.step_scalars import reference as scalar_layout

__all__ = ["GradAccumulator"]


_grad, _shape, _dtype, _device = map(attrgetter, ("grad", "shape", "dtype", "device"))


class _ReducerGuard:
    """Refuses a backward that ends in DDP's reducer, which takes gradients only in the dtype of their parameters.

    A parameter does not know the reducers it belongs to, so modules that exist when the first gradient arrives are
    searched for, once. One that is wrapped later meets torch's own error.
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = {id(param) for param in params}
        self._modules: list[weakref.ref[DistributedDataParallel]] | None = None

    def __call__(self) -> None:
        if not distributed():
            return
        if self._modules is None:
            modules = [obj for obj in gc.get_objects() if issubclass(type(obj), DistributedDataParallel)]
            ours = [m for m in modules if any(id(p) in self._params for p in m.parameters())]
            self._modules = [weakref.ref(module) for module in ours]
        for ref in self._modules:
            module = ref()
            # True where the last forward ran outside no_sync(): that, not where backward runs, is what decides.
            if module is not None and module.require_forward_param_sync:
                raise RuntimeError(
                    "GradAccumulator: DistributedDataParallel is about to average the gradients of this backward in "
                    "the dtype of their parameters, got bf16 or fp16 parameters, whose gradients accumulate in fp32; "
                    "run every micro-batch under no_sync() and average them in fp32: for grad in accumulator.grads: "
                    "torch.distributed.all_reduce(grad); grad.div_(world_size)"
                )


class GradAccumulator:
    """Accumulates micro-batch gradients in fp32 and keeps their norm current, with any optimizer.

    While it is attached and someone refers to it, ``backward()`` folds every gradient into an fp32 ``p.grad``: for fp32
    parameters that is what autograd does anyway, one pass cheaper with the norm; bf16 and fp16 parameters get an fp32
    gradient (``p.grad_dtype`` is set to None for them), so that many small micro-batches are not lost to rounding. The
    first micro-batch after :meth:`zero_grad` overwrites, nothing is ever zeroed. A micro-batch gradient is freed as
    soon as it is folded. A ``p.grad_dtype`` that the user has set stays; float32 shows the same gradients, at the cost
    of autograd widening each one first.

    Under ``DistributedDataParallel`` fp32 parameters work as ever: micro-batches under ``no_sync()``, the last one
    without. Its reducer takes gradients only in the dtype of their parameters, so with bf16 or fp16 ones a backward
    that would synchronise raises before it modifies anything: run all micro-batches under ``no_sync()`` and average in
    fp32, ``for grad in accumulator.grads: torch.distributed.all_reduce(grad); grad.div_(world_size)``.

    Args:
        params: Parameters, of the dtype and on the device where they stay; those with ``requires_grad=False`` are
            passed over.
        measure: Count the bytes of gradients for :attr:`peak_grad_bytes`; some microseconds a parameter and backward.

    Raises:
        ValueError: No parameter requires grad, one is of a dtype other than fp32, bf16 and fp16, one has another
            ``grad_dtype`` than None, float32 and its own, or another accumulator or gradkern optimizer already folds
            one; nothing is hooked then.
        RuntimeError: From methods, once parameters have changed dtype or device.

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

    def __init__(self, params: Iterable[torch.Tensor], *, measure: bool = False) -> None:
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
            if param.grad_dtype not in (None, torch.float32, param.dtype):
                raise ValueError(
                    f"GradAccumulator: params[{i}] has grad_dtype {param.grad_dtype}, expected None, torch.float32 or "
                    f"{param.dtype}; set param.grad_dtype, or leave it to autograd"
                )
            if not kernel_can_read(param) or param.device != self._params[0].device:
                raise ValueError(
                    f"GradAccumulator: params[{i}] is a {type(param).__name__} on {param.device}, stride "
                    f"{param.stride()}, expected plain dense parameters on {self._params[0].device}; use one "
                    "accumulator per device and leave the rest to autograd"
                )
        narrow = any(p.dtype != torch.float32 for p in self._params)
        self._meter = GradMeter() if measure else None
        guard = _ReducerGuard(self._params) if narrow else None
        self._fold = GradFold(self._params, "GradAccumulator", meter=self._meter, guard=guard)
        self._widened = [p for p in self._params if p.dtype != torch.float32 and p.grad_dtype == p.dtype]
        for param in self._widened:
            param.grad_dtype = None
        self._dtypes, self._device = list(map(_dtype, self._params)), self._params[0].device
        self._fold_caches: dict[tuple[torch.dtype, bool], AddressTable] = {}

    @property
    def grads(self) -> list[torch.Tensor]:
        """The accumulated gradients, fp32, of the parameters that have one."""
        return [p.grad for p in self._params if p.grad is not None]

    @property
    def peak_grad_bytes(self) -> int:
        """The most bytes of gradients that were there at once, since the accumulator was made.

        Accumulated gradients, the buffers kept for them after :meth:`zero_grad`, and micro-batch gradients while they
        live, counted whenever one arrives; one that autograd has computed but not delivered yet is not seen.

        Raises:
            RuntimeError: The accumulator was made without ``measure=True``.
        """
        if self._meter is None:
            raise RuntimeError(
                "GradAccumulator.peak_grad_bytes: nothing was measured, expected an accumulator made with "
                "GradAccumulator(params, measure=True)"
            )
        self._meter.recount()
        return self._meter.peak_bytes

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
        if True not in map(is_, grads, repeat(None)) and self._fold_all(cast("Sequence[torch.Tensor]", grads), shown):
            return
        places = [i for i, grad in enumerate(grads) if grad is not None]
        params = [self._params[i] for i in places]
        given = [cast("torch.Tensor", grads[i]) for i in places]
        self._check_given(params, given)
        self._check_shown(given, [shown[i] for i in places])
        given_dtypes = list(map(_dtype, given))
        fresh = [shown[i] is None for i in places]
        for dtype in dict.fromkeys(given_dtypes):
            for overwrite in (True, False):
                mask = [d == dtype and f == overwrite for d, f in zip(given_dtypes, fresh, strict=True)]
                some = list(compress(params, mask))
                if some:
                    self._fold_list(some, list(compress(given, mask)), None if overwrite else _wide_grads(some))

    def norm(self) -> torch.Tensor:
        """L2 norm of the accumulated gradients, 0-dim fp32; free where they were folded. Does not synchronise.

        Edits that bump no version (``GradScaler.unscale_``, ``.data``, numpy) are not noticed here;
        :meth:`clip_grad_norm_` and ``gradkern.get_total_norm`` read the gradients themselves. So does this where
        ``torch.distributed`` is initialised, because collectives bump none either.
        """
        self._check_unmoved()
        trusted = not distributed()
        listed = known_partials(self.grads) if trusted else None
        scalars = functional.new_scalars(self._params[0].device)
        if listed is None:
            scalars = self._scalars(math.inf, self._known() if trusted else [])
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
        self._check_unmoved()
        scalars = self._scalars(float(max_norm), [])
        multiplier = scalars[scalar_layout.GRAD_MULTIPLIER].float()
        for grad in self.grads:
            grad.mul_(multiplier)
        return scalars[scalar_layout.NORM].float()

    def cast_grads_(self) -> None:
        """Show the gradients of bf16 and fp16 parameters in their own dtype, for optimizers that insist on it.

        Where the user has set ``p.grad_dtype``, it stays.
        """
        for param in self._params:
            if param.grad is not None and param.grad_dtype is None:
                param.grad = param.grad.to(param.dtype)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients without touching memory: the next micro-batch overwrites."""
        self._check_unmoved()
        for param in self._params:
            param.grad = None

    def detach(self) -> None:
        """Remove every hook and give autograd the gradients of all parameters back."""
        self._fold.detach()
        for param in self._widened:
            if param.grad is not None:
                param.grad = param.grad.to(param.dtype)
            param.grad_dtype = param.dtype
        self._widened = []

    def _check_unmoved(self) -> None:
        """A parameter of another dtype or device has another autograd node, without our hook."""
        device = self._params[0].device
        if list(map(_dtype, self._params)) == self._dtypes and self._device == device:
            return
        raise RuntimeError(
            "GradAccumulator: parameters have changed dtype or device since it was made, so that backward no longer "
            f"folds their gradients, got {self._params[0].dtype} on {device}, expected {self._dtypes[0]} on "
            f"{self._device}; convert the model first, then make the accumulator"
        )

    def _fold_all(self, grads: Sequence[torch.Tensor], shown: Sequence[torch.Tensor | None]) -> bool:
        """Fold in one launch, which checks its operands itself before it writes; False where one is not enough."""
        dtypes = set(map(_dtype, grads))
        fresh = all(map(is_, shown, repeat(None)))
        if len(dtypes) != 1 or not dtypes <= DTYPE_CODES.keys():
            return False
        if not fresh and (True in map(is_, shown, repeat(None)) or set(map(_dtype, shown)) != {torch.float32}):
            return False
        try:
            self._fold_list(self._params, grads, None if fresh else cast("Sequence[torch.Tensor]", shown))
        except (TypeError, ValueError):
            self._check_given(self._params, grads)
            raise
        return True

    def _check_given(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        # Shapes one at a time: thousands of tuples kept at once make the garbage collector look.
        if (
            all(map(torch.Tensor.is_contiguous, params))
            and all(map(torch.Tensor.is_contiguous, grads))
            and all(map(eq, map(_shape, grads), map(_shape, params)))
            and set(map(_dtype, grads)) <= DTYPE_CODES.keys()
            and set(map(_device, grads)) <= {self._params[0].device}
        ):
            return
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            fits = grad.shape == param.shape and grad.stride() == param.stride() and grad.device == param.device
            if not fits or grad.dtype not in DTYPE_CODES:
                raise ValueError(
                    f"GradAccumulator.accumulate_: gradient {i} is {grad.dtype} of shape {tuple(grad.shape)}, stride "
                    f"{grad.stride()} on {grad.device}, expected fp32, bf16 or fp16 laid out as its parameter: shape "
                    f"{tuple(param.shape)}, stride {param.stride()} on {param.device}"
                )

    def _check_shown(self, given: Sequence[torch.Tensor], shown: Sequence[torch.Tensor | None]) -> None:
        """Each launch checks its own operands, but only this keeps the first from folding what the next refuses."""
        for i, (grad, main_grad) in enumerate(zip(given, shown, strict=True)):
            if main_grad is not None and not laid_alike(main_grad, grad):
                raise ValueError(
                    f"GradAccumulator.accumulate_: gradient {i} has shape {tuple(grad.shape)}, stride {grad.stride()}, "
                    f"the p.grad that it is added to has shape {tuple(main_grad.shape)}, stride {main_grad.stride()}, "
                    "expected the same; lay p.grad out as its parameter, or set it to None"
                )

    def _fold_list(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        main_grads: Sequence[torch.Tensor] | None,
    ) -> None:
        """Add gradients of one dtype to ``main_grads``; None: set fresh ones and show them."""
        overwrite = main_grads is None
        if main_grads is None:
            main_grads = self._fold.fresh_main_grads(params)
        cache = self._fold_caches.setdefault((grads[0].dtype, overwrite), AddressTable())
        fold_list_(main_grads, grads, overwrite=overwrite, cache=cache)
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


def _wide_grads(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients shown, widened where ``cast_grads_()`` or autograd left them narrow."""
    for param in params:
        if param.grad is not None and param.grad.dtype != torch.float32:
            param.grad = param.grad.float()
    return cast("list[torch.Tensor]", list(map(_grad, params)))
