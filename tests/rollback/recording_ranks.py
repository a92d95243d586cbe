"""Small runs recorded by several processes under DistributedDataParallel, and what one process makes of the same data.

Every function that takes ``rank`` runs in each of the processes of :func:`in_ranks`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from recorded_models import PRELOADED, TokenModel, token_data, token_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*PRELOADED, "torch.distributed", "recording_ranks"])

DATA = token_data()
STEPS = 10


def made(seed: int = 0) -> tuple[TokenModel, gk.AdamW]:
    torch.manual_seed(seed)
    model = TokenModel()
    return model, gk.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_norm=0.5)


def even_rows(rank: int, ranks: int, step: int, half: int) -> torch.Tensor:
    """Three samples of its own for every rank."""
    return (torch.arange(3) + 3 * (ranks * (2 * step + half) + rank)) % len(DATA)


def uneven_rows(rank: int, ranks: int, step: int, half: int) -> torch.Tensor:
    """The same samples for every rank, but each leaves out one more."""
    return (torch.arange(ranks + 1 - rank) + 5 * (2 * step + half)) % len(DATA)


def backward(model, recorder, rows: torch.Tensor) -> None:
    with nullcontext() if recorder is None else recorder.batch(rows + 100):
        (token_loss(model(DATA[rows]), DATA[rows]) / 2).backward()


def make_steps(ddp, optimizer, recorder, rank, steps: Iterable[int], *, rows=even_rows, syncs_once=True) -> list[Any]:
    """Train; returns the gradients of every step."""
    ranks, gradients = torch.distributed.get_world_size(), []
    for step in steps:
        for half in (0, 1):
            with ddp.no_sync() if syncs_once and half == 0 else nullcontext():
                backward(ddp, recorder, rows(rank, ranks, step, half))
        gradients.append([parameter.grad.clone() for parameter in ddp.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def in_one_process(path: Path, ranks: int, steps: int = STEPS, *, rows=even_rows, **options: Any) -> nn.Module:
    """The same training by one process, with the samples of all ranks in one batch, recorded."""
    model, optimizer = made()
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for step in range(steps):
            for half in (0, 1):
                parts = [rows(rank, ranks, step, half) for rank in range(ranks)]
                with recorder.batch(torch.cat(parts) + 100):
                    outputs = model(DATA[torch.cat(parts)]).split([len(part) for part in parts])
                    losses = [token_loss(output, DATA[part]) for output, part in zip(outputs, parts, strict=True)]
                    (sum(losses) / ranks / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def _worker(rank: int, ranks: int, folder: Path, fn: Callable[[int, Path], Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=ranks
    )
    torch.save(fn(rank, folder), folder / f"result-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_ranks(ranks: int, folder: Path, fn: Callable[[int, Path], Any]) -> list[Any]:
    """Call ``fn(rank, folder)`` in so many processes; None for one that did not return."""
    processes = [PROCESSES.Process(target=_worker, args=(rank, ranks, folder, fn)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [folder / f"result-{rank}.pt" for rank in range(ranks)]
    return [torch.load(file) if file.exists() else None for file in results]


def wrapped(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)
