from __future__ import annotations

import pytest
import torch

from bench import checkpoint
from bench.architectures import mlp
from bench.harness import Report
from gradkern.checkpoint import allocator_unavailable_reason

unavailable = allocator_unavailable_reason()


@pytest.mark.skipif(unavailable is not None, reason=f"the suite caps the allocator: {unavailable}")
def test_the_suite_tells_what_plans_promise_and_keep(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "ARCHITECTURES", {"mlp": mlp})
    monkeypatch.setattr(checkpoint, "CHAINS", ((6, 2),))
    monkeypatch.setattr(checkpoint, "BUDGETS", 3)
    monkeypatch.setattr(checkpoint, "EXECUTED", ("mlp",))
    report = Report("checkpoint", torch.device("cpu"))
    checkpoint.run(report, rounds=7)
    assert capsys.readouterr().out.count("\n") == len(report.records)
    values = {(record["case"], record["metric"]): record["value"] for record in report.records}
    assert values["mlp", "plans_executed"] == 2**6
    assert values["mlp", "units_recomputed_in_excess"] >= 0
    assert values["mlp", "runs"] == 3
    assert values["mlp", "budget_violations"] == values["all models", "budget_violations"] == 0
    assert values["mlp", "gradients_bit_equal"] == 1.0
    assert 99.9 <= values["mlp", "predicted_of_measured_min"] <= values["mlp", "predicted_of_measured_max"] <= 102.0
    assert values["6 units x 2", "largest_certified_gap"] == 0.0
    assert values["6 units x 2", "more_capacity_cost_more"] == 0
