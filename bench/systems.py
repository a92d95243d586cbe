"""The systems compared: parameters with gradients, and an optimizer of one make over them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradkern as gk

from . import peers

__all__ = ["Replica", "clip_step_systems", "demo_module", "torch_clip_step", "torch_trick_step"]

MAX_NORM = 1.0
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Replica:
    """Parameters of the given shapes with constant gradients, filled once."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params = [nn.Parameter(torch.randn(s, generator=generator, device=device) * 0.02) for s in shapes]
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator, device=device) * 1e-3

    @property
    def numel(self) -> int:
        """Parameters in all tensors."""
        return sum(p.numel() for p in self.params)


def clip_step_systems(shapes: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Callable[[], object]]:
    """Clip by the global norm and step; all step one replica, each with its own state.

    Two replicas differ by where they lie in memory more than by their optimizers. After the first clipping in place,
    gradients have norm ``MAX_NORM``, which changes nothing about the work.

    ``torch grad_scale`` is torch's fastest known way: the norm once, the coefficient handed to the fused kernel through
    the attribute that ``GradScaler`` uses. DeepSpeed's optimizer comes with torch's clipping; the other peers' bare
    steps are so much slower (suite ``step``) that clipping before them would show nothing more.
    """
    replica = Replica(shapes, device)
    params = replica.params
    opt = gk.AdamW(params, lr=1e-4, max_norm=MAX_NORM)
    systems: dict[str, Callable[[], object]] = {
        "gradkern": opt.step,
        "torch clip + fused": torch_clip_step(params),
        "torch grad_scale + fused": torch_trick_step(params),
    }
    clipped_peers = {"DeepSpeedCPUAdam": peers.FP32["DeepSpeedCPUAdam"]}
    for name, make in peers.usable(clipped_peers, device).items():
        systems[f"torch clip + {name}"] = torch_clip_step(params, make)
    return systems


def _fused(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)


def torch_clip_step(params: list[nn.Parameter], make: peers.Maker = _fused) -> Callable[[], object]:
    """Torch's clipping, then the step of an optimizer: torch's fused AdamW by default."""
    opt = make(params, 1e-4)

    def clip_step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return clip_step


def torch_trick_step(params: list[nn.Parameter]) -> Callable[[], object]:
    """Torch's norm, its coefficient handed to torch's fused AdamW as the scale that ``GradScaler`` would."""
    opt = _fused(params, 1e-4)
    none_found = torch.zeros((), device=params[0].device)

    def trick_step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        opt.grad_scale = torch.clamp((norm + 1e-6) / MAX_NORM, min=1.0)  # type: ignore[attr-defined]
        opt.found_inf = none_found  # type: ignore[attr-defined]
        opt.step()

    return trick_step


def demo_module(name: str) -> Any:
    """A module of ``examples/demo``."""
    if str(_EXAMPLES) not in sys.path:
        sys.path.append(str(_EXAMPLES))
    return importlib.import_module(f"demo.{name}")
