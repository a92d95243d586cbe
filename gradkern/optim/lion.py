"""Lion, clipped and updated in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradkern.ops.lion_step.spec import STEP
from gradkern.optim._buckets import Bucket
from gradkern.optim._engine import EngineOptions, FusedStepMixin
from gradkern.step_event import ParamStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion"]


class Lion(FusedStepMixin):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay; half of Adam's state.

    ``c = beta1 m + (1 - beta1) g``; ``p = p (1 - lr wd) - lr sign(c)``; ``m = beta2 m + (1 - beta2) g``.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate, a float or a 0-dim tensor; a third to a tenth of AdamW's. Default 1e-4.
        betas: Interpolation of the update and decay of the momentum. Default (0.9, 0.99).
        weight_decay: Decoupled weight decay; three to ten times AdamW's. Default 0.
        maximize: Ascend instead of descend. Default False.
        **engine: See :class:`gradkern.optim.EngineOptions`.

    Raises:
        ValueError: A hyper-parameter or an option out of range.

    Numerics:
        As :class:`gradkern.AdamW`. A NaN in the momentum becomes one in the parameter (``torch.sign`` would hide it).

    Source:
        Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, algorithm 2.
    """

    _OP = STEP

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
        self._start(engine)

    def _hyper(self, group: dict[str, Any]) -> tuple[float | torch.Tensor, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (group["lr"], *group["betas"], group["weight_decay"], sign)

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        group = bucket.group
        beta1, beta2 = group["betas"]
        averages = bucket.columns["exp_avgs"]
        for param, grad, exp_avg, step in zip(bucket.params, grads, averages, bucket.steps, strict=True):
            step.add_(1.0)
            change = (-grad if group["maximize"] else grad) - exp_avg
            update = exp_avg + change * (1.0 - beta1)
            # Each component by itself, as torch's optimizers treat complex parameters.
            sign = torch.view_as_real(update).sign() if update.is_complex() else update.sign()
            sign = torch.view_as_complex(sign) if update.is_complex() else sign
            param.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(sign * group["lr"])
            exp_avg.add_(change * (1.0 - beta2))

    def _event_obstacle(self) -> str | None:
        return "Lion moves parameters by a sign"

    def _param_steps(
        self, bucket: Bucket, numbers: Sequence[float], grad_multiplier: torch.Tensor
    ) -> Iterator[ParamStep]:
        raise NotImplementedError  # no hook can be registered
