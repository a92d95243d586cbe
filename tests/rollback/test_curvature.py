"""The curvature weight of a visit against Hessians of the loss by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradkern.rollback import _curvature
from gradkern.rollback._curvature import curvature_weights, measure_bends


def weights_of(logits, grad, *, is_declared=False):
    bends, _ = measure_bends(logits, grad, scale=None, is_declared=is_declared)
    return curvature_weights(bends)


def loss_of(kind, labels, share):
    """A loss of one sample's logits, shape ``(T, K)``."""

    def loss(logits):
        rows = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        if kind == "mean":
            return share * rows.sum() / (labels != -100).sum()
        return share * (rows * torch.arange(1.0, len(rows) + 1)).sum()

    return loss


@pytest.mark.parametrize("kind", ["mean", "weighted by token"])
@pytest.mark.parametrize(("tokens", "classes"), [(1, 2), (1, 10), (5, 7)])
def test_a_weight_is_the_hessians(kind, tokens, classes):
    torch.manual_seed(tokens)
    logits = 2 * torch.randn(3, tokens, classes)
    labels = torch.randint(0, classes, (3, tokens))
    if tokens > 1:
        labels[:, -1] = -100
    grads, expected = [], []
    for sample in range(3):
        loss = loss_of(kind, labels[sample], share=1 / 32)
        z = logits[sample].double()
        grad = torch.autograd.functional.jacobian(loss, z).flatten()
        hessian = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
        expected.append(grad @ hessian @ grad / grad.square().sum() ** 2)
        grads.append(grad.reshape(tokens, classes).float())
    found = weights_of(logits, torch.stack(grads), is_declared=kind == "weighted by token")
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=0.0)


def test_large_batches_are_looked_at_in_parts(monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3, 5, requires_grad=True), torch.randint(0, 5, (21,))
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits.flatten(0, 1), labels), logits)
    expected = weights_of(logits.detach(), grad)
    monkeypatch.setattr(_curvature, "_CHUNK", 30)
    assert torch.equal(weights_of(logits.detach(), grad), expected)


def test_a_fitted_sample_bends_next_to_nothing():
    # The last one is fitted to the last bit, and another class has underflowed before the right one.
    logits = torch.tensor([[0.0, 8.0, 0.0], [0.0, 60.0, 0.0], [0.0, 0.5, 1.0], [-110.0, 0.0, -20.0]])[:, None]
    grad = torch.softmax(logits, -1) - nn.functional.one_hot(torch.ones(4, 1, dtype=torch.int64), 3)
    for is_declared in (False, True):
        weights = weights_of(logits, grad, is_declared=is_declared)
        assert torch.isfinite(weights).all()
        # What matters is the weight times the square of the gradient: at most as much as the logits bend.
        assert (weights * grad.square().sum((1, 2)) <= 2 * (-grad[:, 0, 1]).clamp(min=1e-5)).all()


def test_where_every_row_is_fitted_the_scale_is_that_of_before():
    logits = torch.tensor([[[0.0, 13.0]], [[0.0, 14.0]]])
    grad = (torch.softmax(logits, -1) - torch.tensor([0.0, 1.0])) / 2
    assert curvature_weights(measure_bends(logits, grad, scale=None, is_declared=False)[0]).isnan().all()
    bends, scale = measure_bends(logits, grad, scale=0.5, is_declared=False)
    assert scale == 0.5
    assert torch.isfinite(curvature_weights(bends)).all()
    # A gradient that such a row of a cross-entropy cannot have.
    far = torch.tensor([[[3.0, -3.0]], [[3.0, -3.0]]])
    assert curvature_weights(measure_bends(logits, far, scale=0.5, is_declared=False)[0]).isnan().all()


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("classes", [2, 5])
def test_where_every_row_is_nearly_fitted_a_scale_that_has_doubled_or_halved_is_followed(classes, factor):
    logits = torch.zeros(3, 1, classes)
    logits[..., 0] = torch.tensor([[9.5], [10.0], [11.0]])  # residuals of 3e-4 to 2e-5
    grad = torch.softmax(logits, -1)
    grad[..., 0] -= 1.0
    for known in (0.25, 2.0**16 / 3):
        expected, scale = measure_bends(logits, known * factor * grad, scale=known * factor, is_declared=False)
        assert scale == known * factor
        found, scale = measure_bends(logits, known * factor * grad, scale=known, is_declared=False)
        assert scale == known * factor
        assert torch.equal(found, expected)
        assert torch.isfinite(found).all()
    # Other factors are another loss.
    found, scale = measure_bends(logits, 1.5 * grad, scale=1.0, is_declared=False)
    assert scale == 1.0
    assert found.isnan().all()


def squared_hinge(z, labels):
    right = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return (1 + others - right).clamp(min=0).square().mean()


def focal(z, labels):
    p = torch.softmax(z, -1).gather(1, labels[:, None])
    return ((1 - p) ** 2 * -p.log()).mean()


OTHERS = {
    "squares": lambda z, y: (z - nn.functional.one_hot(y, z.shape[1])).square().mean(),
    "squares of one output": lambda z, y: (z[:, :1] - y[:, None]).square().mean() + 0 * z.sum(),
    "smoothed labels": lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.1),
    "hidden scale": lambda z, y: nn.functional.cross_entropy(z / 2, y),
    "ascent": lambda z, y: -nn.functional.cross_entropy(z, y),
    "focal": focal,
    "probability": lambda z, y: -torch.softmax(z, -1).gather(1, y[:, None]).mean(),
    "squared hinge": squared_hinge,
    "weights of classes": lambda z, y: nn.functional.cross_entropy(z, y, weight=torch.arange(1.0, 1 + z.shape[1])),
}


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_losses_are_not_claimed(kind, classes):
    torch.manual_seed(0)
    logits = torch.randn(8, 1, classes, requires_grad=True)
    labels = torch.arange(8) % classes
    (grad,) = torch.autograd.grad(OTHERS[kind](logits.flatten(0, 1), labels), logits)
    # Some look right, for one of them sets the scale; an estimator refuses a ledger where any does not.
    assert weights_of(logits.detach(), grad).isnan().sum() >= 3


def test_one_output_is_no_cross_entropy():
    logits, grad = torch.randn(4, 1, 1), torch.randn(4, 1, 1)
    for is_declared in (False, True):
        assert weights_of(logits, grad, is_declared=is_declared).isnan().all()
