"""Kills: a recording process is sent SIGKILL at random moments, and goes on from its last checkpoint.

A loop records a small model, makes a checkpoint every few steps and, when it is started again, resumes from the last.
Processes are forked from one that has imported torch and computed nothing, so that a life takes a fraction of a second.
A third of the kills falls into the opening of the ledger (creating or resuming it), a third anywhere after it, a third
into its closing. After each one

- the ledger must hold every step that the process had reported durable, or the catalog named a moment before (else it
  counts as lost);
- it must open, and every committed byte and record must pass ``verify`` (else as torn);
- a copy of it is trained on to the end, whose files must be, byte for byte, those of a run that nobody killed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._store import StoreReader

from .harness import Report

__all__ = ["Found", "kill_again_and_again", "run_kills"]

KILLS = 200

STEPS = 16
CHECKPOINT_EVERY = 5
STEPS_PER_SEGMENT = 3

_PROCESSES = multiprocessing.get_context("forkserver")
# What the first step of an optimizer and the first file would import, in seconds, in every process anew.
_PRELOADED = ("torch", "torch._dynamo", "safetensors.torch", "gradkern.rollback")
_PHASES = ("opening", "training", "closing")


@dataclass
class Found:
    """What became of the kills.

    Attributes:
        kills: How many fell, by what the process was doing.
        lost: How many lost a step that had been durable.
        torn: How many left a ledger that does not open or does not pass.
        tails_identical: How many could be gone on from to the very files of a run without kills.
    """

    kills: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    torn: int = 0
    tails_identical: int = 0


def run_kills(report: Report) -> None:
    """Two hundred kills."""
    found = kill_again_and_again(KILLS, seed=0)
    total = found.kills.total()
    report.add("kill -9 while recording", "gradkern", "kills", total, "")
    for phase in _PHASES:
        report.add("kill -9 while recording", "gradkern", f"kills_{phase}", found.kills[phase], "")
    report.add("kill -9 while recording", "gradkern", "kills_lost", found.lost, "")
    report.add("kill -9 while recording", "gradkern", "kills_torn", found.torn, "")
    report.add("kill -9 while recording", "gradkern", "kills_tail_identical", found.tails_identical, "")


def kill_again_and_again(kills: int, seed: int) -> Found:
    """Kill so many recording processes, and see what is left of their ledgers."""
    _PROCESSES.set_forkserver_preload([*_PRELOADED, __name__])
    found, drawn = Found(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _finish(folder / "unbroken")  # also starts the process that others are forked from
        expected = contents(folder / "unbroken")
        durations = _durations(folder / "timed")
        while found.kills.total() < kills:
            shutil.rmtree(folder / "run", ignore_errors=True)
            (folder / "run").mkdir()
            # Until a process gets to its end, each goes on where the one before was killed.
            while found.kills.total() < kills and _killed(folder, drawn, durations, found):
                shutil.rmtree(folder / "tail", ignore_errors=True)
                shutil.copytree(folder / "run", folder / "tail")
                _finish(folder / "tail")
                found.tails_identical += contents(folder / "tail") == expected
    return found


def train(folder: Path, told: Connection) -> None:
    """Record to the end, from the last checkpoint if there is one, and tell what is going on and what is durable."""
    torch.set_num_threads(1)
    ledger, saved = folder / "ledger", folder / "saved.pt"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    first, resume = 0, None
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, resume = state["step"], state["recorder"]
    elif ledger.exists():
        shutil.rmtree(ledger)
    told.send(("opening", first))
    recorder = gk.rollback.record(model, optimizer, ledger, steps_per_segment=STEPS_PER_SEGMENT, resume=resume)
    told.send(("training", first))
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        with recorder.batch(range(6 * step, 6 * step + 6)):
            inputs, labels = torch.randn(6, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)
            nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            states = {"model": model, "optimizer": optimizer, "recorder": recorder}
            state = {"step": step + 1, **{name: each.state_dict() for name, each in states.items()}}
            told.send(("training", step + 1))
            torch.save(state, f"{saved}.partial")
            os.replace(f"{saved}.partial", saved)
    told.send(("closing", (STEPS // CHECKPOINT_EVERY) * CHECKPOINT_EVERY))
    recorder.close()
    told.send(("closed", STEPS))


def contents(folder: Path) -> dict[object, object]:
    """Of a training's ledger every committed byte, and what is known of its end."""
    store = StoreReader(folder / "ledger")
    files: dict[object, object] = {
        (entry.role, entry.first_step, entry.end_step): (store.path / entry.name).read_bytes() for entry in store.files
    }
    return {**files, "closing": store.closing}


def check(folder: Path, phase: str, durable: int, found: Found) -> None:
    """Look at what a kill has left.

    Args:
        folder: Of the training.
        phase: What the process was doing.
        durable: How many steps have to be there.
        found: What was found is added to it.
    """
    try:
        ledger = gk.rollback.open(folder / "ledger")
    except LedgerError:
        # Nothing has been promised before the ledger is there.
        if phase != "opening" or (folder / "saved.pt").exists():
            found.torn += 1
            found.lost += 1
        return
    files, records, _ = ledger.verify().checks
    found.torn += not (files.passed and records.passed)
    found.lost += ledger.steps < durable or (phase == "closed" and not ledger.complete)


class _Life:
    """One process that trains in a folder."""

    def __init__(self, folder: Path) -> None:
        self._told, telling = _PROCESSES.Pipe(duplex=False)
        self._folder = folder
        self.process = _PROCESSES.Process(target=train, args=(folder, telling))
        self.process.start()
        telling.close()
        self.phase, self.durable = "starting", 0

    def wait_for(self, phase: str) -> None:
        """Return once the process has told that it is there, or has ended."""
        with suppress(EOFError):
            while self.phase != phase:
                self.phase, self.durable = self._told.recv()

    def catch_up(self) -> None:
        """Take in what has been told so far."""
        with suppress(EOFError):
            while self._told.poll():
                self.phase, self.durable = self._told.recv()

    def kill(self) -> bool:
        """Kill it; False if it had ended by itself."""
        self.catch_up()
        # In the opening it takes out what is after its checkpoint.
        named = StoreReader(self._folder / "ledger").steps if self.phase in ("training", "closing", "closed") else 0
        self.process.kill()
        self.process.join()
        self.catch_up()
        self._told.close()
        self.durable = max(self.durable, named)
        if self.process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a recording process failed with exit code {self.process.exitcode}")
        return self.process.exitcode != 0


def _killed(folder: Path, drawn: random.Random, durations: dict[str, float], found: Found) -> bool:
    """Let a process go on with the training and kill it; False if it got to the end before."""
    life = _Life(folder / "run")
    phase = drawn.choice(_PHASES)
    life.wait_for(phase)
    time.sleep(drawn.uniform(0.0, durations[phase]))
    if not life.kill():
        return False
    found.kills[life.phase if life.phase in _PHASES else "closing"] += 1
    check(folder / "run", life.phase, life.durable, found)
    return True


def _finish(folder: Path) -> None:
    """Train to the end without a kill."""
    folder.mkdir(exist_ok=True)
    life = _Life(folder)
    life.wait_for("closed")
    life.process.join()
    if life.process.exitcode != 0:
        raise RuntimeError(f"a recording process failed with exit code {life.process.exitcode}")


def _durations(folder: Path) -> dict[str, float]:
    """Seconds that each phase takes, of one run."""
    folder.mkdir()
    life = _Life(folder)
    times = []
    for phase in (*_PHASES, "closed"):
        life.wait_for(phase)
        times.append(time.perf_counter())
    life.process.join()
    opening, training, closing, closed = times
    return {"opening": training - opening, "training": closing - training, "closing": closed - closing}
