"""AdamW, clipped and updated in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from gradkern import functional
from gradkern.ops._table import Operands
from gradkern.ops.adamw_step.reference import AdamWHyper, adamw_scalars
from gradkern.optim._base import Bucket, FusedStepMixin, State
from gradkern.step_event import ParamStep

__all__ = ["AdamW"]


class AdamW(FusedStepMixin, torch.optim.AdamW):
    """Drop-in for ``torch.optim.AdamW`` that clips by the global norm inside the update.

    ``clip = min(1, max_norm / (norm + 1e-6))``, then AdamW with ``clip * grad``: what ``clip_grad_norm_`` followed by
    ``torch.optim.AdamW.step`` does, but gradients are read once and not rewritten, and the norm of large parameters is
    a by-product of accumulating them during backward. ``state_dict`` is interchangeable with torch's.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate, a float or a 0-dim tensor. Default 1e-3.
        betas: Decay rates of the two moments. Default (0.9, 0.999).
        eps: Added to the root of the second moment. Default 1e-8.
        weight_decay: Decoupled weight decay. Default 1e-2.
        amsgrad: Divide by the largest second moment so far. Default False.
        maximize: Ascend instead of descend. Default False.
        foreach: Accepted as in torch; there is one implementation here, so it changes nothing.
        capturable: Not supported: the learning rate is read on the host.
        differentiable: Not supported: the update writes in place.
        fused: Accepted as in torch; the update is always fused.
        max_norm: Threshold of the global L2 norm over all groups; ``inf`` measures without clipping, None (default)
            does neither.

    Raises:
        ValueError: A hyper-parameter out of range, ``capturable=True`` or ``differentiable=True``.

    Numerics:
        fp32 arithmetic for fp32, bf16 and fp16 parameters, one IEEE rounding per operation, the same bits on every
        backend; scalars in fp64. Other dtypes use torch's own update. State has the dtype of its parameter.

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
        max_norm: float | None = None,
    ) -> None:
        if differentiable:
            raise ValueError(
                "AdamW: differentiable=True is not supported, expected False: the fused update writes in place and "
                "leaves no graph; use torch.optim.AdamW(..., differentiable=True)"
            )
        if capturable:
            raise ValueError(
                "AdamW: capturable=True is not supported, expected False: the learning rate is read on the host; use "
                "torch.optim.AdamW(..., capturable=True) inside CUDA graphs"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._start(max_norm)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _operands(self, bucket: Bucket) -> Operands:
        return functional.adamw_operands(
            bucket.params,
            bucket.grads,
            bucket.column("exp_avg"),
            bucket.column("exp_avg_sq"),
            bucket.column("max_exp_avg_sq") if bucket.group["amsgrad"] else None,
            bucket.column("step"),
            cache=bucket.step_cache,
        )

    def _launch(self, group: dict[str, Any], operands: Operands, scalars: torch.Tensor) -> None:
        functional.adamw_step_of_(operands, scalars, _hyper(group))

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        group = bucket.group
        beta1, beta2 = group["betas"]
        torch_adamw(
            bucket.params,
            grads,
            bucket.column("exp_avg"),
            bucket.column("exp_avg_sq"),
            bucket.column("max_exp_avg_sq") if group["amsgrad"] else [],
            bucket.column("step"),
            foreach=False,
            capturable=group["capturable"],
            has_complex=any(p.is_complex() for p in bucket.params),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _param_step(
        self, group: dict[str, Any], param: torch.Tensor, state: State, grad_multiplier: torch.Tensor
    ) -> ParamStep:
        s = adamw_scalars(1.0, int(state["step"]), _hyper(group))
        second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]

        def preconditioner() -> torch.Tensor:
            denom: torch.Tensor = second_moment.float().sqrt() * s.inv_bias2_sqrt + s.eps
            return denom.reciprocal() * s.step_size

        return ParamStep(
            param=param,
            grad_multiplier=-grad_multiplier if group["maximize"] else grad_multiplier,
            decay=s.decay,
            momentum=1.0 - s.grad_weight,
            grad_weight=s.grad_weight,
            lr=float(group["lr"]),
            preconditioner=_detached(preconditioner),
        )


def _hyper(group: dict[str, Any]) -> AdamWHyper:
    beta1, beta2 = map(float, group["betas"])
    return AdamWHyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])


def _detached(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def without_grad() -> torch.Tensor:
        with torch.no_grad():
            return compute()

    return without_grad
