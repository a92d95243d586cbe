"""The conservation law holds for real runs, and fails for every way of getting the record wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recorded_models import TokenModel, gpt2, llama, scale_preconditioner, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import Recorder, VerifyReport


def law(report: VerifyReport) -> tuple[bool | None, ...]:
    return tuple(check.passed for check in report.checks if check.name.startswith("conservation"))


def test_holds_for_a_tied_gpt2_with_clipping_and_accumulation(train):
    torch.manual_seed(0)
    model = gpt2()
    run = train(model, token_data(64, 12, 31), steps=110, accumulate=4, micro_batch=2, lr=3e-3, max_norm=1.0)
    ledger = run.ledger()
    assert (ledger.steps, ledger.visits) == (110, 110 * 8)
    found = ledger.conservation(model)
    assert 0 < found.error <= 1e-5
    assert found.unowned_share == 0
    report = ledger.verify(model)
    assert report.passed, str(report)


def test_holds_for_a_llama_with_clipping_and_accumulation(train):
    torch.manual_seed(0)
    model = llama()
    run = train(model, token_data(64, 12, 31), steps=60, accumulate=4, micro_batch=2, lr=3e-3, max_norm=1.0)
    report = run.ledger().verify(model)
    assert report.passed, str(report)
    assert run.ledger().conservation(model).unowned_share == 0
    scores = run.ledger().scores(model, token_data(2, 12, 31), loss_fn=token_loss).scores
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("optimizer", [gk.AdamW, gk.SGD])
def test_holds_for_a_convolution_net_but_for_its_batch_norms(optimizer, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    options = {"lr": 1e-3} if optimizer is gk.AdamW else {"lr": 1e-2, "momentum": 0.9}
    trained = optimizer(model.parameters(), **options, max_norm=1.0)
    inputs, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))
    with gk.rollback.record(model, trained, tmp_path / "run", unowned=["1.*"]) as recorder:
        for step in range(30):
            for micro in range(4):
                rows = torch.arange(8 * step + 2 * micro, 8 * step + 2 * micro + 2) % 32
                with recorder.batch(rows):
                    (nn.functional.cross_entropy(model(inputs[rows]), labels[rows]) / 4).backward()
            trained.step()
            trained.zero_grad()
    report = gk.rollback.open(tmp_path / "run").verify(model)
    assert report.passed, str(report)
    assert "in unowned 1.weight, 1.bias" in str(report)


@pytest.mark.parametrize("lr_of_step", [lambda step: 0.0 if step < 2 else 1e-2, lambda step: 1e-2 / (step + 1)])
def test_holds_when_the_learning_rate_changes_and_starts_at_zero(token_model, train, lr_of_step):
    def schedule(model, optimizer, step):
        optimizer.param_groups[0]["lr"] = lr_of_step(step)

    run = train(token_model, token_data(), steps=6, before_step=schedule)
    assert run.ledger().verify(token_model).passed
    query = token_data()[:1]
    assert torch.isfinite(run.ledger().scores(token_model, query, loss_fn=token_loss).scores).all()


class SometimesUsed(TokenModel):
    """Its hidden layers take part in every second forward only."""

    calls = 0

    def forward(self, ids):
        self.calls += 1
        if self.calls % 2:
            return self.head(self.embed(ids))
        return super().forward(ids)


def test_holds_for_parameters_that_get_no_gradient_in_some_steps(train):
    torch.manual_seed(0)
    model = SometimesUsed()
    run = train(model, token_data(), steps=6, accumulate=1)
    assert run.ledger().verify(model).passed


def test_holds_when_a_gradient_is_cleared_by_hand_before_the_step(token_model, train):
    def clear(model, optimizer, step):
        if step == 2:
            model.hidden.weight.grad = None

    run = train(token_model, token_data(), before_step=clear)
    assert run.ledger().verify(token_model).passed


def test_steps_skipped_on_the_device_change_nothing(token_model, train):
    seen = []

    def skip_third(event):
        seen.append(event)
        return event

    run = train(token_model, token_data(), alter=skip_third)
    assert len(seen) == run.ledger().steps == 5

    # A reported skip leaves shadows and ledger alone, so reporting a real step as skipped breaks the law.
    torch.manual_seed(0)
    counter = iter(range(100))
    skipped = train(
        token_model,
        token_data(),
        name="skipped",
        alter=lambda event: replace(event, skipped=torch.tensor(next(counter) == 2)),
    )
    assert skipped.ledger().steps == 4
    assert law(skipped.ledger().verify(token_model)) == (False, False)


def test_a_step_that_the_device_skips_belongs_to_nobody(token_model, train):
    before = {}

    def overflow(model, optimizer, step):
        optimizer.grad_scale = torch.ones(())
        optimizer.found_inf = torch.tensor(float(step == 2))
        before[step] = [p.detach().clone() for p in model.parameters()]

    run = train(token_model, token_data(), before_step=overflow)
    assert all(map(torch.equal, before[2], before[3]))
    assert not all(map(torch.equal, before[3], before[4]))
    ledger = run.ledger()
    assert ledger.steps == 4
    assert ledger.visits == 4 * 6
    assert ledger.verify(token_model).passed


def test_gradients_that_the_batches_did_not_give_are_refused_at_the_step(token_model, tmp_path):
    data = token_data()

    def backward(recorder):
        with recorder.batch(torch.arange(3)):
            token_loss(token_model(data[:3]), data[:3]).backward()

    optimizer = gk.AdamW(token_model.parameters())
    with gk.rollback.record(token_model, optimizer, tmp_path / "clipped") as recorder:
        backward(recorder)
        gk.clip_grad_norm_(token_model.parameters(), 1e-3)
        with pytest.raises(LedgerError, match=r"is not what the recorded batches gave it.*max_norm="):
            optimizer.step()
    optimizer = gk.AdamW(token_model.parameters())
    optimizer.zero_grad()
    with gk.rollback.record(token_model, optimizer, tmp_path / "cleared") as recorder:
        backward(recorder)
        optimizer.zero_grad()
        backward(recorder)
        with pytest.raises(LedgerError, match=r"recorder\.discard\(\)"):
            optimizer.step()


def test_a_gradient_from_before_the_recording_is_refused(token_model, tmp_path):
    optimizer = gk.AdamW(token_model.parameters())
    data = token_data()
    token_loss(token_model(data[:3]), data[:3]).backward()
    with pytest.raises(LedgerError, match="has a gradient already"):
        gk.rollback.record(token_model, optimizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_nonfinite_gradient_names_its_sample(token_model, tmp_path):
    optimizer = gk.AdamW(token_model.parameters())
    data = token_data()
    with gk.rollback.record(token_model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(torch.tensor([7, 8, 9])):
            (token_loss(token_model(data[:3]), data[:3]) * float("nan")).backward()
        with pytest.raises(LedgerError, match=r"sample 7 left a non-finite gradient on"):
            optimizer.step()


def test_discard_forgets_gradients_cleared_without_a_step(token_model, tmp_path):
    data = token_data()
    for discard in (True, False):
        optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
        path = tmp_path / f"run-{discard}"
        with gk.rollback.record(token_model, optimizer, path) as recorder:
            for step in range(4):
                with recorder.batch(range(24)):
                    token_loss(token_model(data), data).backward()
                if step == 1:
                    optimizer.zero_grad()
                    if discard:
                        recorder.discard()
                    continue
                optimizer.step()
                optimizer.zero_grad()
        ledger = gk.rollback.open(path)
        assert (ledger.steps, ledger.visits) == (3, 72 if discard else 96)
        assert law(ledger.verify(token_model)) == (discard, discard)


def miss_a_layer(model, optimizer, step):
    if step == 3:
        del model.hidden.forward


def extra_gradient(model, optimizer, step):
    if step == 3:
        model.hidden.bias.grad += 1e-3


@pytest.mark.parametrize("sabotage", [miss_a_layer, extra_gradient])
def test_fails_when_a_gradient_was_not_recorded(token_model, train, sabotage):
    run = train(token_model, token_data(), before_step=sabotage, max_norm=None)
    assert law(run.ledger().verify(token_model)) == (False, False)


@pytest.mark.parametrize("layer", ["embed", "norm", "hidden", "head"])
def test_fails_when_one_capture_is_counted_twice(token_model, train, layer, monkeypatch):
    from gradkern.rollback._intake import Intake

    with monkeypatch.context() as early:
        _count_twice(early, Intake, layer)
        with pytest.raises(LedgerError, match="is not what the recorded batches gave it"):
            train(token_model, token_data(), name="noticed at the step")
    token_model.zero_grad()
    # The law itself, without the comparison of some steps that notices first.
    monkeypatch.setattr(Recorder, "_require_captured", lambda *_: None)
    _count_twice(monkeypatch, Intake, layer)
    run = train(token_model, token_data())
    assert law(run.ledger().verify(token_model)) == (False, False)


def _count_twice(monkeypatch, intake, layer):
    def doubled(original):
        def twice(self, owned, *args):
            original(self, owned, *args)
            if owned.name == layer:
                original(self, owned, *args)

        return twice

    for name in ("take_matrix", "take_bias", "take_embedding", "take_norm"):
        monkeypatch.setattr(intake, name, doubled(getattr(intake, name)))


def test_fails_when_the_reported_preconditioner_is_not_the_one_used(token_model, train):
    run = train(token_model, token_data(), alter=lambda event: scale_preconditioner(event, 1.001))
    assert law(run.ledger().verify(token_model)) == (False, False)


@pytest.mark.parametrize("field", ["decay", "momentum", "grad_weight", "grad_multiplier"])
def test_fails_when_a_reported_factor_is_not_the_one_used(token_model, train, field):
    def wrong(event):
        return replace(
            event,
            params=tuple(update._replace(**{field: getattr(update, field) * 0.999}) for update in event.params),
        )

    run = train(token_model, token_data(), alter=wrong)
    assert law(run.ledger().verify(token_model)) == (False, False)


def norm_recorded(path, weights, *, lr, drift=0.0):
    """Record three steps on a LayerNorm whose bias has the sum of ``weights`` for its gradient."""
    model, inputs = nn.LayerNorm(8), torch.randn(64, 50, 8)
    optimizer = gk.AdamW(model.parameters(), lr=lr)
    with gk.rollback.record(model, optimizer, path) as recorder:
        for _ in range(3):
            with recorder.batch(range(64)):
                (model(inputs) * weights).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if drift:
                with torch.no_grad():
                    model.bias[1:] += drift
    return gk.rollback.open(path).conservation(model)


@pytest.mark.parametrize("seed", range(4))
def test_holds_where_the_gradient_of_a_bias_nearly_cancels(tmp_path, seed):
    torch.manual_seed(seed)
    weights = torch.randn(64, 50, 8)
    weights[-1, -1, 0] -= weights[..., 0].double().sum().float() - 1e-4
    found = norm_recorded(tmp_path / "run", weights, lr=1e-2)
    # Another order of summing gives that element another gradient by far more than a rounding, and Adam steps by lr.
    assert found.error < 1e-5
    assert found.worst_ratio < 1


def test_an_element_without_gradient_hides_nothing(tmp_path):
    torch.manual_seed(0)
    weights = torch.randn(64, 50, 8)
    weights[..., 0] = 0
    assert norm_recorded(tmp_path / "run", weights, lr=1e-3, drift=1e-3).worst_ratio > 100


def test_fails_for_a_model_that_moved_after_the_recording(token_model, train):
    run = train(token_model, token_data())
    assert run.ledger().verify(token_model).passed
    with torch.no_grad():
        token_model.back.bias[0] += 1e-3
    report = run.ledger().verify(token_model)
    assert not report.passed
    assert "at back.bias" in str(report)


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(self.batch_norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def test_the_residual_holds_what_the_user_named_and_nothing_else(train):
    torch.manual_seed(0)
    model = WithBatchNorm()
    with pytest.raises(ValueError, match=r"'batch_norm\.weight', 'batch_norm\.bias'"):
        train(model, token_data(), name="refused")
    run = train(model, token_data(), unowned=["batch_norm.*"])
    found = run.ledger().conservation(model)
    assert 0.01 < found.unowned_share < 0.9
    report = run.ledger().verify(model)
    assert report.passed
    assert "unowned batch_norm.weight, batch_norm.bias" in str(report)
