"""Models of which only a part is trained: adapters beside frozen layers, biases alone, frozen heads."""

from __future__ import annotations

import pytest
import torch
from recorded_models import LoraLinear, llama, token_data, token_loss, with_adapters
from torch import nn
from torch.nn import functional as F

import gradkern as gk


@pytest.mark.parametrize("estimator", ["direct", "ref"])
def test_adapters_of_a_frozen_llama_obey_the_law_and_explain(estimator, train, tmp_path):
    torch.manual_seed(0)
    model = with_adapters(llama(), "q_proj", "v_proj", "down_proj")
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    data = token_data(24, 12, 31)
    run = train(model, data, steps=12, accumulate=4, lr=3e-3)
    ledger = run.ledger()
    found = ledger.conservation(model)
    assert found.unowned_share == 0
    assert ledger.verify(model).passed
    for name, each in frozen.items():
        assert torch.equal(each, model.get_parameter(name))
    scores = ledger.explain(model.eval(), data[:1], k=5, loss_fn=token_loss, estimator=estimator)
    assert len(scores) == 5
    assert all(abs(each.score) > 0 for each in scores)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def class_data():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(24, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def make_optimizer(model):
    return gk.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2, max_norm=1.0)


def train_classes(model, recorder_of, keep=None):
    optimizer, (inputs, labels) = make_optimizer(model), class_data()
    keep = torch.ones(24, dtype=torch.bool) if keep is None else keep
    torch.manual_seed(1)
    with recorder_of(model, optimizer) as recorder:
        for step in range(10):
            rows = torch.arange(8 * step, 8 * step + 8) % 24
            with recorder.batch(rows):
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_what_samples_did_to_adapters_is_undone(tmp_path):
    torch.manual_seed(0)
    model = with_adapters(Classifier(), "body")
    train_classes(model, lambda *args: gk.rollback.record(*args, tmp_path / "run", replayable=True))
    ledger, (inputs, labels) = gk.rollback.open(tmp_path / "run"), class_data()
    replay = gk.rollback.Replay(
        fetch=lambda ids: (inputs[ids], labels[ids]), make_optimizer=make_optimizer, loss_fn=F.cross_entropy
    )
    exact = ledger.undo(model, [3, 4, 5, 6, 7], replay=replay).model
    fast = ledger.undo(model, [3, 4, 5, 6, 7], method="fast", probe=inputs[:8], share=1.0).model
    base = model.body.base_layer.weight
    for undone in (exact, fast):
        assert torch.equal(undone.body.base_layer.weight, base)
        assert not torch.equal(undone.body.lora_B["default"].weight, model.body.lora_B["default"].weight)


PARTS = {
    "biases alone": lambda name: name.endswith("bias"),
    "weights alone": lambda name: name.endswith("weight"),
    "all but the head": lambda name: name.startswith("body"),
    "the head": lambda name: name.startswith("head"),
}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_a_model_trained_in_part_is_recorded_and_its_logits_known(part, low, tmp_path):
    """Without an estimator a query warns where nothing is known of how later steps reacted."""
    torch.manual_seed(0)
    model = Classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part](name))
    optimizer, (inputs, labels) = make_optimizer(model), class_data()
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for step in range(10):
            rows = torch.arange(8 * step, 8 * step + 8) % 24
            with recorder.batch(rows), torch.autocast("cpu", torch.bfloat16, enabled=low):
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.verify(model).passed
    scores = ledger.scores(model, inputs[:1], loss_fn=lambda output, _: F.cross_entropy(output, labels[:1]))
    assert torch.isfinite(scores.scores).all()


def test_adapters_that_are_no_layers_are_refused_by_name(tmp_path):
    model = LoraLinear(nn.Linear(6, 4), 2)
    model.lora_embedding_A["default"] = nn.Parameter(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"captured for 'lora_embedding_A\.default'.*unowned="):
        gk.rollback.record(model, make_optimizer(model), tmp_path / "run")


def test_a_rule_that_is_not_linear_in_the_gradient_is_refused(tmp_path):
    model = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="Lion"):
        gk.rollback.record(model, gk.Lion(model.parameters()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "forward" not in vars(model)
