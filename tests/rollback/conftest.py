"""One loop that trains and records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from recorded_models import EventTap, Run, TokenModel, token_loss
from torch import nn

import gradkern as gk
from gradkern.step_event import StepEvent


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tmp_path):
    """Train and record: ``train(model, data, steps=...)`` returns a :class:`Run`."""

    def run(
        model: nn.Module,
        data: torch.Tensor,
        *,
        steps: int = 5,
        accumulate: int = 2,
        micro_batch: int = 3,
        lr: float = 1e-2,
        weight_decay: float = 0.1,
        max_norm: float | None = 0.5,
        ids: Sequence[int] | None = None,
        alter: Callable[[StepEvent], StepEvent] | None = None,
        before_step: Callable[[nn.Module, torch.optim.Optimizer, int], None] | None = None,
        name: str = "run",
        **options: Any,
    ) -> Run:
        numbers = torch.arange(100, 100 + len(data)) if ids is None else torch.tensor(ids)
        model.train()
        optimizer = gk.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, max_norm=max_norm)
        source = optimizer if alter is None else EventTap(optimizer, alter)
        cursor = 0
        with gk.rollback.record(model, source, tmp_path / name, **options) as recorder:
            for step in range(steps):
                for _ in range(accumulate):
                    rows = torch.arange(cursor, cursor + micro_batch) % len(data)
                    cursor += micro_batch
                    with recorder.batch(numbers[rows]):
                        (token_loss(model(data[rows]), data[rows]) / accumulate).backward()
                if before_step is not None:
                    before_step(model, optimizer, step)
                optimizer.step()
                optimizer.zero_grad()
        return Run(model, recorder, tmp_path / name)

    return run


@pytest.fixture
def token_model() -> nn.Module:
    torch.manual_seed(0)
    return TokenModel()
