"""The transformer of the benchmark is recorded whole, and its figures are of what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import budgets
from bench.influence import record_run, retrained_losses


def test_the_transformer_is_recorded_whole_and_retrained_as_it_was_trained(tmp_path):
    setting = replace(budgets.digits_transformer(), epochs=1)
    model, ledger = record_run(setting, 0, tmp_path / "run", bytes_per_visit=2000)
    assert ledger.verify(model).passed
    assert sum(parameter.numel() for parameter in model.parameters()) == 7034
    assert budgets._record_bytes(ledger) <= 2000
    expected = nn.functional.cross_entropy(model(setting.test_inputs), setting.test_labels, reduction="none")
    found = retrained_losses(setting, 0, torch.ones(1, len(setting.inputs), dtype=torch.bool))
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("options", "least"), [({"rank": budgets.TOKENS}, 0.98), ({"bytes_per_visit": 64_000}, 0.85)])
def test_what_is_recorded_is_near_the_exact_gradient_of_that_sample(tmp_path, monkeypatch, options, least):
    monkeypatch.setattr(budgets, "EPOCHS", 3)
    truth = {}
    _, ledger = budgets._record_gpt2(budgets._pieces()[:32], tmp_path / "run", options, truth)
    (cosine,) = budgets._delta_cosines(ledger, truth)
    # With all rows of the factors, what is left is rounding to int8, which the preconditioner enlarges.
    assert least < cosine < 0.9999
