"""Loss scaling without a pass over the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """Drop-in for ``torch.amp.GradScaler`` that leaves unscaling and the search for inf and NaN to the step.

    torch's scaler reads and writes all gradients before the step, be it only to look for inf and NaN. gradkern's
    optimizers take the scale as a part of the one multiplier that clipping forms anyway, and a norm that is not finite
    says that some gradient is not: it skips the step on the device and tells :meth:`update` to back off. Scaling,
    clipping (``max_norm=`` or ``clip=`` of the optimizer) and the step are one pass, also for fp16 gradients, which
    torch cannot unscale.

    Growth, backoff, ``state_dict``, several optimizers and the order of calls are torch's. With optimizers that are
    not gradkern's, after :meth:`unscale_`, with gradients that are no plain tensors (DTensor) and with a clip policy
    whose norm is of another order than 1, 2 or inf, it does exactly what torch's does.

    Args:
        device: As in torch; "cpu" for parameters on the CPU. Default "cuda".
        init_scale: First scale. Default 2**16.
        growth_factor: Default 2.
        backoff_factor: Default 0.5.
        growth_interval: Steps without inf or NaN before the scale grows. Default 2,000.
        enabled: False makes it pass everything through. Default True.

    Example:
        >>> import torch, gradkern as gk
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = gk.AdamW(model.parameters(), max_norm=1.0)
        >>> scaler = gk.GradScaler("cpu")
        >>> scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        >>> scaler.step(opt)
        >>> scaler.update()

    Note:
        Nothing synchronises with a GPU, and gradients keep their scale: read ``opt.grad_norm``, which is that of the
        unscaled ones, or call :meth:`unscale_` first. Where a clip policy joins several optimizers, step gradkern's
        before torch's, and call :meth:`unscale_` for all of them or for none.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale, clip, update, or skip where a gradient is not finite: as torch's, in the pass of the update.

        Args:
            optimizer: Whose step it is.
            *args: Handed on to ``optimizer.step``.
            **kwargs: The same.

        Returns:
            What ``optimizer.step`` returned.

        Raises:
            RuntimeError: ``closure=`` was given, or the optimizer has stepped already since the last :meth:`update`.
            AssertionError: Nothing was scaled yet.
        """
        derives_found_inf = getattr(optimizer, "derives_found_inf", None)
        if (
            not self._enabled
            or self._scale is None
            or "closure" in kwargs
            or derives_found_inf is None
            or self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY
            or not derives_found_inf()
        ):
            return super().step(optimizer, *args, **kwargs)
        optimizer_state = self._per_optimizer_states[id(optimizer)]
        # A product, as in torch: what the user has set counts too. It is a tensor of its own, which update() leaves.
        optimizer.grad_scale = self._scale * getattr(optimizer, "grad_scale", 1.0)  # type: ignore[attr-defined]
        optimizer.found_inf_per_device = optimizer_state["found_inf_per_device"]  # type: ignore[attr-defined]
        try:
            result: float | None = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf_per_device  # type: ignore[attr-defined]
        optimizer_state["stage"] = OptState.STEPPED
        return result
