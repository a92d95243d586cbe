"""Suite ``state8``: AdamW with moments of 8 bits and fewer, beside torch's fused fp32 step: time, and bytes held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import gradkern as gk

from . import peers
from .harness import Report, Triad, interleave
from .systems import Replica

__all__ = ["held_bytes", "run"]

CASES = {"large_6x4096x4096": lambda: [(4096, 4096)] * 6}  # 101 M parameters

# A system that takes longer than this for a step has fewer rounds; its record "rounds" says so.
SLOW_SECONDS = 1.0
SLOW_ROUNDS = 3


def _plain_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor with memory of its own inside ``value``: containers and wrapper subclasses are opened."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _plain_tensors([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _plain_tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _plain_tensors(item)


def held_bytes(optimizer: Optimizer) -> int:
    """Bytes of parameters and optimizer state; storages, so that what several tensors share counts once."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    storages = [t.untyped_storage() for t in _plain_tensors([params, optimizer.state])]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    for case, shapes in CASES.items():
        _steps(report, case, shapes(), rounds)


def _steps(report: Report, case: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    device = report.device
    makers: dict[str, peers.Maker] = {
        "gradkern int8": lambda params, lr: gk.AdamW(params, lr, state="int8"),
        "torch fused fp32": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
        **peers.usable(peers.LOW_BIT, device),
    }
    replicas = {name: Replica(shapes, device) for name in makers}
    optimizers = {name: make(replicas[name].params, 1e-4) for name, make in makers.items()}
    systems: dict[str, Callable[[], object]] = {name: opt.step for name, opt in optimizers.items()}
    first = interleave(systems, device, rounds=1, warm_up=1)  # allocates the states and compiles what is compiled
    fewer = {name: SLOW_ROUNDS for name in systems if first[name][0] > SLOW_SECONDS}
    triad = Triad(device)
    timings = interleave({**systems, **triad.systems()}, device, rounds=rounds, warm_up=0, fewer=fewer)
    report.add_times(case, "step", timings, systems)
    for name in systems:
        report.add(case, name, "rounds", len(timings[name]), "rounds")
    for other in list(systems)[1:]:
        report.add_ratio(case, "speedup", timings, other, "gradkern int8")
    report.add(case, "triad", "bandwidth", triad.bandwidth(timings) / 1e9, "GB/s")
    for name, optimizer in optimizers.items():
        held = held_bytes(optimizer) / replicas[name].numel
        report.add(case, name, "held", held, "B/param")
        # The least a step can move: parameters and states are read and written, the fp32 gradient is read.
        bandwidth = (2 * held + 4) * replicas[name].numel / min(timings[name])
        report.add(case, name, "share_of_triad", 100 * bandwidth / triad.bandwidth(timings), "%")
