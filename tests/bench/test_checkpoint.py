from __future__ import annotations

import pytest
import torch

from bench import checkpoint, plan_scale, planners
from bench.architectures import mlp
from bench.harness import Report
from gradkern.checkpoint import allocator_unavailable_reason

unavailable = allocator_unavailable_reason()


@pytest.mark.skipif(unavailable is not None, reason=f"the suite caps the allocator: {unavailable}")
def test_the_suite_tells_what_plans_promise_and_keep(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "ARCHITECTURES", {"mlp": mlp})
    monkeypatch.setattr(checkpoint, "CHAINS", ((6, 2),))
    monkeypatch.setattr(checkpoint, "BUDGETS", 3)
    monkeypatch.setattr(checkpoint, "COMPARED", ("mlp",))
    monkeypatch.setattr(planners, "BUDGETS", 3)
    monkeypatch.setattr(planners, "SETTINGS", 3)
    monkeypatch.setattr(plan_scale, "STAGES", (10,))
    monkeypatch.setattr(plan_scale, "LENGTHS", 5)
    small = {**plan_scale.LLAMA_70B, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    monkeypatch.setattr(plan_scale, "LLAMA_70B", {**small, "num_attention_heads": 4, "num_key_value_heads": 2})
    report = Report("checkpoint", torch.device("cpu"))
    checkpoint.run(report, rounds=7)
    assert capsys.readouterr().out.count("\n") == len(report.records)
    values = {(record["case"], record["metric"]): record["value"] for record in report.records}
    compared = {record["system"]: record["value"] for record in report.records if record["metric"] == "budgets_met"}
    assert {"all sets of units", "every n layers", "torch dp, operators", "sqrt(n)"} <= compared.keys()
    assert values["mlp", "fastest_within_budget"] >= 50.0
    assert values["gpt2, 5 lengths", "budget_violations"] == 0
    assert values["nested, 10 stages x 8", "peak_of_capacity"] <= 100.0
    assert values["llama 70B, 64 x H100", "units"] == 4
    assert values["mlp", "runs"] == 3
    assert values["mlp", "budget_violations"] == values["all models", "budget_violations"] == 0
    assert values["mlp", "gradients_bit_equal"] == 1.0
    assert 99.9 <= values["mlp", "predicted_of_measured_min"] <= values["mlp", "predicted_of_measured_max"] <= 102.0
    assert values["6 units x 2", "largest_certified_gap"] == 0.0
    assert values["6 units x 2", "more_capacity_cost_more"] == 0
