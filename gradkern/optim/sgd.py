"""SGD with momentum, clipped and updated in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.sgd import sgd as torch_sgd

from gradkern.ops.sgd_step.reference import MOMENTUM, NESTEROV, sgd_scalars
from gradkern.ops.sgd_step.spec import STEP
from gradkern.optim._buckets import Bucket
from gradkern.optim._engine import EngineOptions, FusedStepMixin
from gradkern.step_event import ParamStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD"]


class SGD(FusedStepMixin, torch.optim.SGD):
    """Drop-in for ``torch.optim.SGD`` that clips inside the update.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate, a float or a 0-dim tensor, which is read on the device. Default 1e-3.
        momentum: Default 0: no state.
        dampening: Of the momentum. Default 0.
        weight_decay: L2 penalty, added to the gradient. Default 0.
        nesterov: Nesterov momentum. Default False.
        maximize: Ascend instead of descend. Default False.
        foreach: Accepted as in torch; there is one implementation here, so it changes nothing.
        differentiable: Run torch's own differentiable update. Default False.
        fused: Accepted as in torch; the update is always fused.
        **engine: See :class:`gradkern.optim.EngineOptions`.

    Raises:
        ValueError: A hyper-parameter or an option out of range, such as 8-bit state without momentum.

    Numerics:
        As :class:`gradkern.AdamW`. Sparse gradients are left to torch's own update.

    Source:
        Semantics of ``torch/optim/sgd.py``, torch 2.13 (Sutskever et al., ICML 2013, without its learning rate inside
        the momentum).
    """

    _OP = STEP
    _STEP_IN_STATE = False

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(engine)

    def _variant(self, group: dict[str, Any]) -> int:
        return (MOMENTUM if group["momentum"] != 0 else 0) | (NESTEROV if group["nesterov"] else 0)

    def _hyper(self, group: dict[str, Any]) -> tuple[float | torch.Tensor, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (group["lr"], group["momentum"], group["dampening"], group["weight_decay"], sign)

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        group = bucket.group
        has_buffer = group["momentum"] != 0
        # A buffer that has seen no step is made by torch from the first gradient.
        buffers: list[torch.Tensor | None] = [
            buffer if float(step) > 0 else None
            for buffer, step in zip(bucket.columns.get("momentum_buffers", []), bucket.steps, strict=False)
        ]
        torch_sgd(
            bucket.params,
            grads,
            buffers if has_buffer else [None] * len(grads),
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for i, step in enumerate(bucket.steps):
            step.add_(1.0)
            made = buffers[i] if has_buffer else None
            if made is not None and made is not bucket.columns["momentum_buffers"][i]:
                if group["differentiable"] or made.is_sparse:
                    bucket.columns["momentum_buffers"][i] = self.state[bucket.params[i]]["momentum_buffer"] = made
                else:
                    bucket.columns["momentum_buffers"][i].copy_(made)

    def _check_sparse(self) -> None:
        """Torch's SGD takes sparse gradients."""

    def _event_obstacle(self) -> str | None:
        for group in self.param_groups:
            if group["nesterov"] or group["weight_decay"] != 0:
                return "nesterov momentum and weight decay in the gradient do not fit the event's formula"
        return super()._event_obstacle()

    def _param_steps(
        self, bucket: Bucket, numbers: Sequence[float], grad_multiplier: torch.Tensor
    ) -> Iterator[ParamStep]:
        group = bucket.group
        multiplier = -grad_multiplier if group["maximize"] else grad_multiplier
        has_buffer = group["momentum"] != 0
        scalars_at = cache(lambda step: sgd_scalars(numbers, 1.0, step, self._variant(group)))
        for param, count in zip(bucket.params, bucket.steps, strict=True):
            _, _, old_weight, grad_weight, _, lr = scalars_at(int(count))
            yield ParamStep(
                param=param,
                grad_multiplier=multiplier,
                decay=1.0,
                momentum=old_weight if has_buffer else 0.0,
                grad_weight=grad_weight if has_buffer else 1.0,
                lr=lr,
                step_size=lr,
            )
