"""Adam and AdamW, clipped and updated in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw as torch_adamw

from gradkern.ops.adamw_step.reference import AMSGRAD, COUPLED, adamw_scalars
from gradkern.ops.adamw_step.spec import STEP
from gradkern.optim._buckets import Bucket
from gradkern.optim._engine import EngineOptions, FusedStepMixin
from gradkern.step_event import ParamStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adam", "AdamW"]


class _AdamStep(FusedStepMixin):
    """What Adam and AdamW share; they differ in where the decay goes."""

    _OP = STEP

    def _variant(self, group: dict[str, Any]) -> int:
        coupled = group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False)
        return (AMSGRAD if group["amsgrad"] else 0) | (COUPLED if coupled else 0)

    def _hyper(self, group: dict[str, Any]) -> tuple[float | torch.Tensor, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], sign)

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        group = bucket.group
        beta1, beta2 = group["betas"]
        update = torch_adamw if group.get("decoupled_weight_decay", False) else torch_adam
        update(
            bucket.params,
            grads,
            bucket.columns["exp_avgs"],
            bucket.columns["exp_avg_sqs"],
            bucket.columns["max_exp_avg_sqs"] if group["amsgrad"] else [],
            bucket.steps,
            foreach=False,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            has_complex=any(p.is_complex() for p in bucket.params),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _event_obstacle(self) -> str | None:
        for group in self.param_groups:
            if self._variant(group) & COUPLED:
                return "coupled weight decay makes the parameter a part of its gradient"
        return super()._event_obstacle()

    def _param_steps(
        self, bucket: Bucket, numbers: Sequence[float], grad_multiplier: torch.Tensor
    ) -> Iterator[ParamStep]:
        group, variant = bucket.group, self._variant(bucket.group)
        moments = bucket.columns["max_exp_avg_sqs" if group["amsgrad"] else "exp_avg_sqs"]
        multiplier = -grad_multiplier if group["maximize"] else grad_multiplier
        lr = float(group["lr"])
        scalars_at = cache(lambda step: adamw_scalars(numbers, 1.0, step, variant))
        for param, count, second_moment in zip(bucket.params, bucket.steps, moments, strict=True):
            # A first step that was skipped has not been counted, and has no bias correction.
            _, decay, grad_weight, _, _, inv_bias2_sqrt, eps, step_size = scalars_at(max(1, int(count)))
            # By position: this runs for every parameter at every step.
            yield ParamStep(
                param,
                multiplier,
                decay,
                1.0 - grad_weight,
                grad_weight,
                lr,
                step_size,
                second_moment,
                inv_bias2_sqrt,
                eps,
            )


class Adam(_AdamStep, torch.optim.Adam):
    """Drop-in for ``torch.optim.Adam`` that clips inside the update.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate, a float or a 0-dim tensor, which is read on the device. Default 1e-3.
        betas: Decay rates of the two moments. Default (0.9, 0.999).
        eps: Added to the root of the second moment. Default 1e-8.
        weight_decay: L2 penalty, added to the gradient. Default 0.
        amsgrad: Divide by the largest second moment so far. Default False.
        maximize: Ascend instead of descend. Default False.
        foreach: Accepted as in torch; there is one implementation here, so it changes nothing.
        capturable: Accepted as in torch; nothing is read on the host either way.
        differentiable: Run torch's own differentiable update. Default False.
        fused: Accepted as in torch; the update is always fused.
        decoupled_weight_decay: As in torch: decay the parameter instead of the gradient. Default False.
        **engine: See :class:`gradkern.optim.EngineOptions`.

    Raises:
        ValueError: A hyper-parameter or an option out of range.

    Numerics:
        As :class:`AdamW`.

    Source:
        Kingma & Ba, arXiv 1412.6980, algorithm 1; semantics of ``torch/optim/adam.py``, torch 2.13.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._start(engine)


class AdamW(_AdamStep, torch.optim.AdamW):
    """Drop-in for ``torch.optim.AdamW`` that clips inside the update.

    With ``max_norm``: ``clip = min(1, max_norm / (norm + 1e-6))``, then AdamW with ``clip * grad``, which is what
    ``clip_grad_norm_`` followed by ``torch.optim.AdamW.step`` does; but gradients are read once and not rewritten, and
    the norm of large parameters is a by-product of accumulating them during backward. ``state_dict`` is interchangeable
    with torch's.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate, a float or a 0-dim tensor, which is read on the device. Default 1e-3.
        betas: Decay rates of the two moments. Default (0.9, 0.999).
        eps: Added to the root of the second moment. Default 1e-8.
        weight_decay: Decoupled weight decay. Default 1e-2.
        amsgrad: Divide by the largest second moment so far. Default False.
        maximize: Ascend instead of descend. Default False.
        foreach: Accepted as in torch; there is one implementation here, so it changes nothing.
        capturable: Accepted as in torch; nothing is read on the host either way.
        differentiable: Run torch's own differentiable update. Default False.
        fused: Accepted as in torch; the update is always fused.
        **engine: See :class:`gradkern.optim.EngineOptions`.

    Raises:
        ValueError: A hyper-parameter or an option out of range.

    Numerics:
        fp32 arithmetic for fp32, bf16 and fp16 parameters, one IEEE rounding per operation, the same bits on every
        backend; scalars in fp64. Other dtypes use torch's own update.

    Example:
        >>> import torch, gradkern as gk
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = gk.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> opt.step()
        >>> opt.grad_norm.shape
        torch.Size([])

    Source:
        Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; semantics of ``torch/optim/adamw.py``, torch 2.13.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(engine)
