"""Runs a test's function in two processes joined by gloo and hands back what each returned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORLD = 2


def _worker(rank: int, folder: Path, fn: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD
    )
    torch.save(fn(rank), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is done and saved. What C++ destroys at exit is not waited for: presumably it was there that a thread not
    # yet joined aborted the process, in one of many runs ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_two_processes(fn: Callable[[int], Any], folder: Path) -> list[Any]:
    """Call ``fn(rank)`` in each; what it returns must be something ``torch.save`` takes."""
    torch.multiprocessing.spawn(_worker, (folder, fn), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]
