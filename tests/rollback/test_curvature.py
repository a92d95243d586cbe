"""The curvature weight of a visit against Hessians of the loss by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradkern.rollback._curvature import curvature_weights, measure_bends


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
    found = curvature_weights(measure_bends(logits, torch.stack(grads)))
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=0.0)


def test_a_fitted_sample_bends_next_to_nothing():
    logits = torch.zeros(2, 1, 4)
    logits[:, 0, 1] = torch.tensor([8.0, 60.0])
    grad = torch.softmax(logits, -1) - nn.functional.one_hot(torch.ones(2, 1, dtype=torch.int64), 4)
    weights = curvature_weights(measure_bends(logits, grad))
    assert torch.isfinite(weights).all()
    # What matters is the weight times the square of the gradient: at most as much as the logits bend.
    assert (weights * grad.square().sum((1, 2)) <= 2 * (-grad[:, 0, 1]).clamp(min=1e-5)).all()


@pytest.mark.parametrize("kind", ["squares", "smoothed labels", "hidden scale", "ascent"])
def test_other_losses_are_not_claimed(kind):
    torch.manual_seed(0)
    logits = torch.randn(4, 1, 6, requires_grad=True)
    labels = torch.randint(0, 6, (4,))
    flat = logits.flatten(0, 1)
    loss = {
        "squares": lambda: (flat - nn.functional.one_hot(labels, 6)).square().mean(),
        "smoothed labels": lambda: nn.functional.cross_entropy(flat, labels, label_smoothing=0.1),
        "hidden scale": lambda: nn.functional.cross_entropy(flat / 2, labels),
        "ascent": lambda: -nn.functional.cross_entropy(flat, labels),
    }[kind]()
    (grad,) = torch.autograd.grad(loss, logits)
    assert curvature_weights(measure_bends(logits.detach(), grad)).isnan().all()
