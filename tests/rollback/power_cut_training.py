"""Short recorded runs that say at every moment what has been promised; ``test_power_cut.py`` traces them.

``python power_cut_training.py FOLDER MODELS`` records every one of RUNS to a ledger in a folder of its own, which is
there already, and saves what it has trained to MODELS. One process for all, since importing torch takes longest.
"""

from __future__ import annotations

import ctypes
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path

import torch
from recorded_models import TokenModel, token_data, token_loss

import gradkern as gk

# Where the ledger is. Its parent is not there either.
LEDGER = "runs/ledger"

# The last segment is a short one, written by close().
STEPS = 7
STEPS_PER_SEGMENT = 2
ROWS = 5

# Which of the commits of close() cannot sync the folder at its end, so that close() has to be called again.
RUNS = {"untroubled": 0, "segment_fails": 1, "deltas_fail": 2}


def train(run: str, folder: Path) -> TokenModel:
    # The library that traces this process.
    tracer = ctypes.CDLL(None)

    def promise(text: str) -> None:
        tracer.trace_mark(f"{run}/{text}".encode())

    torch.manual_seed(0)
    model, data = TokenModel(), token_data(samples=ROWS)
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    recorder = gk.rollback.record(model, optimizer, folder / run / LEDGER, steps_per_segment=STEPS_PER_SEGMENT)
    promise("0")
    for step in range(1, STEPS + 1):
        with recorder.batch(range(ROWS)):
            token_loss(model(data), data).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % STEPS_PER_SEGMENT == 0:
            recorder.state_dict()
        promise(str(step // STEPS_PER_SEGMENT * STEPS_PER_SEGMENT))
    if RUNS[run]:
        tracer.trace_fail_sync(RUNS[run])
        # Whether the right sync failed is for the test to see, by the trace.
        with suppress(sqlite3.OperationalError, OSError):
            recorder.close()
    recorder.close()
    promise("closed")
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RUNS:
        torch.save(train(name, Path(sys.argv[1])).state_dict(), Path(sys.argv[2]) / name)
