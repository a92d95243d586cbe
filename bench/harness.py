"""Timing that a noisy machine cannot bend: systems take turns in rotating order, minima of many rounds are compared.

Each record is ``{suite, case, system, metric, value, unit, env}``. The yardstick of bandwidth, a triad over arrays far
larger than any cache, takes its turns among the systems of every measurement.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gradkern as gk
from gradkern import _native

__all__ = ["Report", "Triad", "interleave"]

Timings = dict[str, list[float]]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    systems: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    warm_up: int = 2,
    fewer: Mapping[str, int] | None = None,
) -> Timings:
    """Seconds of every call, by system; the order rotates from round to round.

    ``fewer`` names systems that drop out after so many timed rounds, because they are very slow.
    """
    names = list(systems)
    limits = {name: (fewer or {}).get(name, rounds) for name in names}
    timings: Timings = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if turn - warm_up >= limits[name]:
                continue
            _synchronize(device)
            start = time.perf_counter()
            systems[name]()
            _synchronize(device)
            if turn >= warm_up:
                timings[name].append(time.perf_counter() - start)
    return timings


class Triad:
    """``out = a + 3 b`` in our own loop on the same threads; the better of plain and streaming stores counts."""

    bytes_moved: int

    def __init__(self, device: torch.device, numel: int = 1 << 25) -> None:
        self._arrays = [torch.ones(numel, device=device) for _ in range(3)]
        self.bytes_moved = 12 * numel
        self._native = device.type == "cpu" and _native.unavailable_reason() is None

    def systems(self) -> dict[str, Callable[[], object]]:
        """The variants to interleave with what is measured."""
        out, a, b = self._arrays
        if not self._native:
            return {"triad": lambda: torch.add(a, b, alpha=3.0, out=out)}
        return {
            "triad plain": lambda: torch.ops.gradkern._triad_(out, a, b, False),
            "triad streaming": lambda: torch.ops.gradkern._triad_(out, a, b, True),
        }

    def bandwidth(self, timings: Timings) -> float:
        """Bytes per second of the best variant in these timings."""
        return max(self.bytes_moved / min(timings[name]) for name in self.systems())


@functools.cache
def _machine(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), cpu)
    return {
        "gradkern": gk.__version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "isa": _native.isa(),
    }


def _environment(device: torch.device) -> dict[str, Any]:
    return {**_machine(device), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}


def _fact(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["case"], record["system"], record["metric"]


@dataclass
class Report:
    """Records of one suite, printed as they come and written as JSON."""

    suite: str
    device: torch.device
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: str, system: str, metric: str, value: float, unit: str) -> None:
        """One fact."""
        env = _environment(self.device)
        self.records.append(
            {
                "suite": self.suite,
                "case": case,
                "system": system,
                "metric": metric,
                "value": value,
                "unit": unit,
                "env": env,
            }
        )
        print(f"{case:20} {metric:28} {system:42} {value:10.3f} {unit}", flush=True)

    def add_times(self, case: str, what: str, timings: Timings, systems: Iterable[str]) -> None:
        """Minimum, median and 80th percentile of the given systems."""
        for system in systems:
            seconds = sorted(timings[system])
            p80 = seconds[min(len(seconds) - 1, round(0.8 * (len(seconds) - 1)))]
            self.add(case, system, f"{what}_min", 1e3 * seconds[0], "ms")
            self.add(case, system, f"{what}_median", 1e3 * statistics.median(seconds), "ms")
            self.add(case, system, f"{what}_p80", 1e3 * p80, "ms")

    def add_ratio(self, case: str, metric: str, timings: Timings, slow: str, fast: str) -> None:
        """How many times the minimum of ``fast`` fits into the minimum of ``slow``."""
        self.add(case, f"{slow} / {fast}", metric, min(timings[slow]) / min(timings[fast]), "x")

    def write_into(self, path: str | None) -> None:
        """Write the records to ``path`` in place of those of the same case, system and metric, beside the others."""
        if path is not None and Path(path).exists():
            new = {_fact(record) for record in self.records}
            self.records[:0] = [record for record in json.loads(Path(path).read_text()) if _fact(record) not in new]
        self.write(path)

    def write(self, path: str | None) -> None:
        """Write the records to ``path``, atomically, if there is one."""
        if path is None:
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(target.suffix + ".part")
        part.write_text("[\n" + ",\n".join(map(json.dumps, self.records)) + "\n]\n")
        part.replace(target)
