"""Clipping by the norm of all gradients, also of several optimizers, or of every group by itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch.utils.weak import TensorWeakRef

from gradkern import functional
from gradkern.clip.policy import ClipPolicy
from gradkern.ops._chunks import kernel_can_read
from gradkern.ops.step_scalars.reference import CLIP_COEF

__all__ = ["GlobalNorm", "GroupNorm"]


_Seen = list[tuple[TensorWeakRef, int]]
"""Gradients and their versions."""


class _MeasuresItself(Protocol):
    """An optimizer that knows sums of squares of its gradients better than by a pass over them."""

    def norm_partials(self, *, trusted: bool) -> list[torch.Tensor]:
        """fp64 sums of squares; those of earlier only if they can be trusted."""


class GlobalNorm(ClipPolicy):
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does.

    One object given to several optimizers clips by their joint norm, measured when the first of them steps. An
    optimizer of torch takes part through :meth:`attach`; its gradients are scaled in place before its step.

    Args:
        max_norm: Threshold, at least 0; ``inf`` measures without clipping.
        norm_type: Order of the norm. Only order 2 is a by-product of accumulation; another costs a pass.
        error_if_nonfinite: Raise before anything is changed, naming the parameters, where the norm is NaN or infinite;
            reads the norm on the host at every step. Default False, as in torch.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    Example:
        >>> import torch, gradkern as gk
        >>> a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> clip = gk.clip.GlobalNorm(1.0)
        >>> first = gk.AdamW(a.parameters(), clip=clip)
        >>> second = torch.optim.SGD(b.parameters(), lr=0.1)
        >>> handle = clip.attach(second)
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> None:
        self.max_norm = max_norm
        self.norm_type = float(norm_type)
        self.error_if_nonfinite = error_if_nonfinite
        self._members: list[weakref.ref[torch.optim.Optimizer]] = []
        self._block: torch.Tensor | None = None
        # What the block was formed of, by optimizer: a member takes part in a round once.
        self._round: dict[int, _Seen] = {}

    def __repr__(self) -> str:
        order = "" if self.norm_type == 2.0 else f", norm_type={self.norm_type}"
        return f"{type(self).__name__}({self.max_norm}{order})"

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers are bound again when they are unpickled.
        return {**self.__dict__, "_members": [], "_block": None, "_round": {}}

    @property
    def max_norm(self) -> float:
        """Threshold of the norm; may be changed between steps, for a joint norm between rounds."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        if not value >= 0.0:
            raise ValueError(
                f"{type(self).__name__}: max_norm must be at least 0 (inf measures the norm without clipping), got "
                f"{value}"
            )
        self._max_norm = float(value)

    def threshold(self, group: Mapping[str, Any]) -> float:
        """The same for all groups."""
        return self.max_norm

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember an optimizer whose gradients count.

        Raises:
            ValueError: It was attached: its gradients would be scaled twice.
        """
        if self._scale_before in optimizer._optimizer_step_pre_hooks.values():
            raise ValueError(
                f"{self!r}: this {type(optimizer).__name__} takes part already by attach(), expected one that does "
                "not; remove() what attach() returned first"
            )
        self.unbind(optimizer)
        self._members.append(weakref.ref(optimizer))

    def unbind(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget an optimizer: its gradients count no more."""
        self._members = [ref for ref in self._members if ref() not in (None, optimizer)]

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Let an optimizer of torch take part: before each of its steps its gradients are scaled in place.

        Under a gradient scaler, step gradkern's optimizers first, and call ``unscale_`` for all optimizers or for none:
        a norm over gradients of which some are scaled means nothing.

        Args:
            optimizer: Any ``torch.optim.Optimizer`` with plain gradients on one device, such as ``torch.optim.Muon``.

        Returns:
            A handle; its ``remove()`` ends the scaling (the gradients still count while the optimizer lives).

        Raises:
            ValueError: The norm is not of order 2, or the optimizer takes part already.
        """
        if self.norm_type != 2.0:
            raise ValueError(f"{self!r}: only norms of order 2 can be joint, got norm_type={self.norm_type}")
        if getattr(optimizer, "clip", None) is self:
            raise ValueError(
                f"{self!r}: this {type(optimizer).__name__} takes part already, expected one that does not: "
                "gradients would be scaled twice; attach once, and leave optimizers that have the policy as clip= alone"
            )
        self.bind(optimizer)
        return optimizer.register_step_pre_hook(self._scale_before)

    def together(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """All members that are still there."""
        return [member for ref in self._members if (member := ref()) is not None]

    def joint(self, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """The block formed of the gradients of all members, for one of them; None with a single member."""
        members = self.together(optimizer)
        if len(members) < 2:
            return None
        if self.norm_type != 2.0:
            raise ValueError(f"{self!r}: only norms of order 2 can be joint; give each optimizer a policy of its own")
        seen = self._round.pop(id(optimizer), None)
        if self._block is None or seen is None or not _still(optimizer, seen):
            self._measure(optimizer, members)
            self._round.pop(id(optimizer), None)
        return self._block

    def _measure(self, optimizer: torch.optim.Optimizer, members: list[torch.optim.Optimizer]) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        # A verdict without a scale: a gradient scaler has unscaled the gradients, which leaves no trace at the others.
        trusted = scale is not None or getattr(optimizer, "found_inf", None) is None
        partials = [block for member in members for block in _partials(member, trusted=trusted)]
        devices = {block.device for block in partials}
        if len(devices) > 1:
            raise ValueError(
                f"{self!r}: a joint norm needs all gradients on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; give each optimizer a policy of its own"
            )
        block = functional.new_scalars(devices.pop() if devices else torch.device("cpu"))
        functional.step_scalars_(block, [], partials, max_norm=self.max_norm, grad_scale=scale)
        self._block = block
        self._round = {id(member): _seen(member) for member in members}

    @torch.no_grad()
    def _scale_before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        block = self.joint(optimizer)
        grads = _grads(optimizer)
        if block is None:  # the others are gone
            block = functional.new_scalars(grads[0].device if grads else torch.device("cpu"))
            functional.step_scalars_(block, [], _partials(optimizer), max_norm=self.max_norm)
        if grads:
            # Without the scale: a gradient scaler has unscaled these already, or a fused step is about to.
            torch._foreach_mul_(grads, block[CLIP_COEF].float().to(grads[0].device))


class GroupNorm(GlobalNorm):
    """Clip every parameter group by its own norm: by ``group["max_norm"]`` where it has one.

    Args:
        max_norm: Threshold of groups that name none.
        norm_type: As in :class:`GlobalNorm`.
        error_if_nonfinite: As in :class:`GlobalNorm`.
    """

    per_group = True

    def threshold(self, group: Mapping[str, Any]) -> float:
        """Of this group."""
        return float(group.get("max_norm", self.max_norm))

    def together(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """Groups are never measured together, let alone optimizers."""
        return [optimizer]


def _grads(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _seen(optimizer: torch.optim.Optimizer) -> _Seen:
    return [(TensorWeakRef(grad), grad._version) for grad in _grads(optimizer)]


def _still(optimizer: torch.optim.Optimizer, seen: _Seen) -> bool:
    """Whether the gradients are those that were seen, unchanged; not merely others in their place."""
    grads = _grads(optimizer)
    return len(grads) == len(seen) and all(
        ref() is grad and version == grad._version for grad, (ref, version) in zip(grads, seen, strict=True)
    )


def _partials(optimizer: torch.optim.Optimizer, *, trusted: bool = True) -> list[torch.Tensor]:
    if hasattr(optimizer, "norm_partials"):
        return cast("_MeasuresItself", optimizer).norm_partials(trusted=trusted)
    blocks = []
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in _grads(optimizer):
        if kernel_can_read(grad):
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        else:
            wide = torch.complex128 if grad.is_complex() else torch.float64
            blocks.append(torch.linalg.vector_norm(grad, dtype=wide).double().square().reshape(1))
    blocks.extend(functional.sumsq(same) for same in by_kind.values())
    return blocks
