"""Ranks that cannot go on with a ledger: all of them hear why, and none waits for another."""

from __future__ import annotations

import torch
from recording_ranks import backward, even_rows, in_ranks, made, wrapped
from test_ranks import told

import gradkern as gk


def refused(rank, folder):
    """What each rank is told."""
    messages = {}
    alone, trains = made()
    with gk.rollback.record(alone, trains, folder / f"alone {rank}") as recorder:
        backward(alone, recorder, even_rows(0, 1, 0, 0))
        trains.step()
        trains.zero_grad()
        state = recorder.state_dict()
    around = wrapped(alone)
    messages["count"] = told(lambda: gk.rollback.record(around, trains, folder / f"alone {rank}", resume=state))
    alone.zero_grad()
    sharded, trains = made()
    sharded_ddp = wrapped(sharded)
    with gk.rollback.record(sharded_ddp, trains, folder / "damaged") as recorder:
        backward(sharded_ddp, recorder, even_rows(rank, 2, 0, 0))
        trains.step()
        trains.zero_grad()
        state = recorder.state_dict()
    torch.distributed.barrier()
    if rank == 1:
        (folder / "damaged" / "rank-00001" / "catalog.sqlite").write_bytes(b"no catalog at all" * 100)
    messages["damaged"] = told(lambda: gk.rollback.record(sharded_ddp, trains, folder / "damaged", resume=state))
    return messages


def test_ranks_that_cannot_go_on_are_all_told(tmp_path):
    for messages in in_ranks(2, tmp_path, refused):
        assert "was recorded by 1 process, and 2 would go on with it" in messages["count"]
        assert "rank 1 cannot go on with its shard of the ledger: the catalog" in messages["damaged"]
