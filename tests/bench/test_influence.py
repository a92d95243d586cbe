"""Retraining many models at once is training one, and the reweighted sweep foretells it better than the direct one."""

from __future__ import annotations

import torch
from torch import nn

from bench.influence import Setting, datamodeling_score, record_run, retrained_losses
from gradkern.rollback import Replay


def small():
    """Three noisy clouds of points, some with the wrong label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (240,), generator=generator)
    points = nn.functional.one_hot(labels, 3).float() @ torch.randn(3, 8, generator=generator)
    points = points + torch.randn(240, 8, generator=generator)
    labels[::10] = (labels[::10] + 1) % 3
    return Setting(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)),
        points[:200],
        labels[:200],
        points[200:],
        labels[200:],
        epochs=8,
        batch_size=20,
    )


def test_retraining_on_everything_is_the_recorded_run(tmp_path):
    setting = small()
    model, _ = record_run(setting, 3, tmp_path / "run")
    expected = nn.functional.cross_entropy(model(setting.test_inputs), setting.test_labels, reduction="none")
    found = retrained_losses(setting, 3, torch.ones(2, 200, dtype=torch.bool))
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-3, atol=1e-4)


def test_a_subset_is_trained_on_as_if_the_others_were_not_there():
    setting = small()
    kept = torch.ones(1, 200, dtype=torch.bool)
    kept[0, 50:] = False
    found = retrained_losses(setting, 0, kept)
    others = torch.where(torch.arange(200) < 50, setting.labels, 0)  # whatever they say
    setting.labels.copy_(others)
    assert torch.equal(retrained_losses(setting, 0, kept), found)


def test_following_later_steps_foretells_retraining_better(tmp_path):
    setting = small()
    model, ledger = record_run(setting, 0, tmp_path / "run", replayable=True)
    kept = torch.rand(80, 200, generator=torch.Generator().manual_seed(1)).argsort(dim=1) >= 20
    losses = retrained_losses(setting, 0, kept)
    replay = Replay(setting.fetch, setting.make_optimizer, nn.functional.cross_entropy)
    score = {}
    for estimator in ("direct", "ref", "gauss_newton"):
        given = {"replay": replay} if estimator == "gauss_newton" else {}
        found = ledger.scores(
            model, setting.queries(), loss_fn=nn.functional.cross_entropy, estimator=estimator, **given
        )
        score[estimator] = datamodeling_score(found.scores, kept, losses)
    assert score["ref"] > max(0.4, score["direct"] + 0.1), score
    assert score["gauss_newton"] > score["ref"], score


def test_a_datamodeling_score_is_a_rank_correlation():
    kept = torch.tensor([[True, False], [False, True], [False, False]])
    scores = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    losses = torch.tensor([[2.0, 3.0], [1.0, 2.0], [9.0, 1.0]])
    # Left out: the second, the first, both. The first point agrees, of the second the order is turned round.
    assert datamodeling_score(scores[:1], kept, losses[:, :1]) == 1.0
    assert datamodeling_score(scores[1:], kept, losses[:, 1:]) == -0.5
