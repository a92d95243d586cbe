"""Policies that judge a gradient's norm by those that came before; all of it on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gradkern.clip.policy import ClipPolicy, set_clip_
from gradkern.ops.step_scalars.reference import CLIP_COEF, NORM

__all__ = ["AutoClip", "SkipOnSpike", "ZClip"]


class _Remembering(ClipPolicy):
    """A policy with tensors of its own, made on the device of the first norm and saved with the optimizer."""

    _names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._loaded: Mapping[str, torch.Tensor] = {}

    def _start(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The memory before the first step: fp64 tensors by name."""
        raise NotImplementedError

    def _recall(self, device: torch.device) -> dict[str, torch.Tensor]:
        if not self._memory:
            self._memory = self._start(device)
            for name, value in self._loaded.items():
                self._memory[name].copy_(value)
        return self._memory

    def state_dict(self) -> dict[str, Any]:
        """What was remembered."""
        return {name: value.clone() for name, value in (self._memory or self._loaded).items()}

    def check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse the memory of another policy.

        Raises:
            ValueError: It has other entries than this one's, or entries of another shape.
        """
        expected = {name: tuple(value.shape) for name, value in self._start(torch.device("cpu")).items()}
        got = {name: tuple(torch.as_tensor(value).shape) for name, value in state_dict.items()}
        if state_dict and got != expected:
            raise ValueError(
                f"{self!r}: got the memory of another policy, with {_shapes(got)}, expected {_shapes(expected)}; "
                "construct the policy that was saved, or drop 'clip' from the state_dict to leave this one as it is"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: As :meth:`check_loaded`.
        """
        self.check_loaded(state_dict)
        self._memory, self._loaded = {}, {name: torch.as_tensor(value) for name, value in state_dict.items()}


class ZClip(_Remembering):
    """Clip a norm that lies more than ``z_threshold`` deviations above the running mean.

    With mean ``m`` and deviation ``s`` of the norms so far and ``z = (norm - m) / s``, a norm with ``z > z_threshold``
    is cut to ``m + s * z_threshold**2 / z``. Mean and variance move by ``1 - alpha`` a step, by the norm after
    clipping; the first ``warmup_steps`` only collect.

    Args:
        alpha: Memory of mean and variance. Default 0.97.
        z_threshold: Default 2.5.
        warmup_steps: Norms collected before the first judgement, at least 2. Default 25.

    Raises:
        ValueError: An argument out of range.

    Source:
        Kumar et al., ZClip, arXiv 2504.02507, algorithm 1 (reciprocal clipping).
    """

    def __init__(self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25) -> None:
        if not 0.0 <= alpha < 1.0 or not z_threshold > 0.0 or warmup_steps < 2:
            raise ValueError(
                f"ZClip: got alpha={alpha}, z_threshold={z_threshold}, warmup_steps={warmup_steps}, expected "
                "0 <= alpha < 1, z_threshold > 0 and warmup_steps >= 2"
            )
        super().__init__()
        self.alpha = float(alpha)
        self.z_threshold = float(z_threshold)
        self.warmup_steps = int(warmup_steps)

    def __repr__(self) -> str:
        return f"ZClip(alpha={self.alpha}, z_threshold={self.z_threshold}, warmup_steps={self.warmup_steps})"

    def _start(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("count", "mean", "variance")}

    def decide_(self, scalars: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Judge the norm, then remember it."""
        memory = self._recall(scalars.device)
        count, mean, variance = memory["count"], memory["mean"], memory["variance"]
        norm = scalars[NORM]
        warm = count >= self.warmup_steps
        deviation = variance.sqrt()
        z = (norm - mean) / deviation
        clips = warm & (z > self.z_threshold)
        limit = mean + deviation * self.z_threshold**2 / z
        coefficient = torch.where(clips, limit / norm, 1.0)
        set_clip_(scalars, torch.where(norm.isnan(), norm, coefficient), scale)
        seen = torch.where(clips, limit, norm)
        finite = norm.isfinite()  # one that is not teaches nothing
        # Collecting: Welford's running mean and population variance; then exponential averages.
        weight = torch.where(warm, 1.0 - self.alpha, 1.0 / (count + 1.0))
        difference = seen - mean
        moved = mean + weight * difference
        spread = torch.where(
            warm,
            self.alpha * variance + (1.0 - self.alpha) * (seen - moved).square(),
            variance + weight * (difference * (seen - moved) - variance),
        )
        mean.copy_(torch.where(finite, moved, mean))
        variance.copy_(torch.where(finite, spread, variance))
        count.add_(finite.double())


class AutoClip(_Remembering):
    """Clip to a percentile of the norms so far.

    Args:
        percentile: Between 0 and 100. Default 10.
        history: Norms that are remembered, in a ring on the device. Default 1,000.

    Raises:
        ValueError: An argument out of range.

    Source:
        Seetharaman et al., AutoClip, arXiv 2007.14469, algorithm 1; with a bounded history.
    """

    def __init__(self, percentile: float = 10.0, history: int = 1000) -> None:
        if not 0.0 <= percentile <= 100.0 or history < 1:
            raise ValueError(
                f"AutoClip: got percentile={percentile}, history={history}, expected 0 <= percentile <= 100 and "
                "history >= 1"
            )
        super().__init__()
        self.percentile = float(percentile)
        self.history = int(history)

    def __repr__(self) -> str:
        return f"AutoClip({self.percentile}, history={self.history})"

    def _start(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "norms": torch.full((self.history,), torch.nan, dtype=torch.float64, device=device),
            "count": torch.zeros((1,), dtype=torch.int64, device=device),
        }

    def decide_(self, scalars: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Remember the norm, then clip to the percentile."""
        memory = self._recall(scalars.device)
        norms, count = memory["norms"], memory["count"]
        norm = scalars[NORM]
        place = count % self.history
        norms.scatter_(0, place, torch.where(norm.isfinite(), norm, norms.gather(0, place)[0]).reshape(1))
        count.add_(norm.isfinite().long())
        limit = norms.nanquantile(self.percentile / 100.0)
        coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
        set_clip_(scalars, torch.where(limit.isnan(), torch.ones_like(norm), coefficient), scale)


class SkipOnSpike(_Remembering):
    """Skip a step whose norm is more than ``factor`` times the running mean, or not finite.

    Args:
        factor: Default 10.
        alpha: Memory of the mean. Default 0.97.
        warmup_steps: Norms collected before the first judgement. Default 25.
        max_norm: Clip, besides, by this norm; default None does not.

    Raises:
        ValueError: An argument out of range.
    """

    skips = True

    def __init__(
        self, factor: float = 10.0, alpha: float = 0.97, warmup_steps: int = 25, max_norm: float | None = None
    ) -> None:
        if not factor > 1.0 or not 0.0 <= alpha < 1.0 or warmup_steps < 1 or not (max_norm is None or max_norm >= 0.0):
            raise ValueError(
                f"SkipOnSpike: got factor={factor}, alpha={alpha}, warmup_steps={warmup_steps}, max_norm={max_norm}, "
                "expected factor > 1, 0 <= alpha < 1, warmup_steps >= 1 and max_norm None or at least 0"
            )
        super().__init__()
        self.factor = float(factor)
        self.alpha = float(alpha)
        self.warmup_steps = int(warmup_steps)
        self.max_norm = max_norm

    def __repr__(self) -> str:
        return f"SkipOnSpike({self.factor}, alpha={self.alpha}, warmup_steps={self.warmup_steps})"

    def threshold(self, group: Mapping[str, Any]) -> float:
        """What is clipped besides."""
        return float("inf") if self.max_norm is None else float(self.max_norm)

    def _start(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("count", "mean")}

    def decide_(self, scalars: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Judge the norm; remember it unless it is skipped."""
        memory = self._recall(scalars.device)
        count, mean = memory["count"], memory["mean"]
        norm = scalars[NORM]
        spike = (count >= self.warmup_steps) & (norm > self.factor * mean)
        skip = spike | ~norm.isfinite()
        set_clip_(scalars, scalars[CLIP_COEF].clone(), scale, skip)
        weight = torch.where(count >= self.warmup_steps, 1.0 - self.alpha, 1.0 / (count + 1.0))
        mean.copy_(torch.where(skip, mean, mean + weight * (norm - mean)))
        count.add_((~skip).double())


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of shape {shape}" for name, shape in sorted(shapes.items()))
