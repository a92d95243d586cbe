"""The systems compared: parameters with gradients, and an optimizer of one make over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

import gradkern as gk

from . import peers

__all__ = ["Replica", "clip_step_systems"]

MAX_NORM = 1.0


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
    opt_trick = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def torch_trick() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in params])
        opt_trick.grad_scale = torch.clamp((norm + 1e-6) / MAX_NORM, min=1.0)
        opt_trick.found_inf = torch.zeros((), device=device)
        opt_trick.step()

    systems: dict[str, Callable[[], object]] = {
        "gradkern": opt.step,
        "torch clip + fused": _clip_step(params, lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True)),
        "torch grad_scale + fused": torch_trick,
    }
    clipped_peers = {"DeepSpeedCPUAdam": peers.FP32["DeepSpeedCPUAdam"]}
    for name, make in peers.usable(clipped_peers, device).items():
        systems[f"torch clip + {name}"] = _clip_step(params, make)
    return systems


def _clip_step(params: list[nn.Parameter], make: peers.Maker) -> Callable[[], object]:
    opt = make(params, 1e-4)

    def clip_step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return clip_step
