from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradkern.loss import compute_loss


class TwoInputs(nn.Module):
    """Returns its inputs' product, wrapped as asked."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x, labels):
        return self.wrap((x * labels).sum())


X, LABELS = torch.arange(3.0), torch.ones(3)


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: SimpleNamespace(loss=loss), lambda loss: {"loss": loss}]
)
def test_mapping_without_loss_fn(wrap):
    assert compute_loss(TwoInputs(wrap), {"x": X, "labels": LABELS}) == 3.0


def test_mapping_with_loss_fn_gets_output_and_batch():
    loss = compute_loss(
        TwoInputs(lambda loss: loss), {"x": X, "labels": LABELS}, lambda out, batch: out + batch["x"][2]
    )
    assert loss == 5.0


def test_pair_and_tensor():
    assert compute_loss(nn.Identity(), (X, LABELS), lambda out, target: (out - target).sum()) == 0.0
    assert compute_loss(nn.Flatten(0), X, lambda out, batch: (out + batch).sum()) == 6.0
    assert compute_loss(nn.Identity(), torch.tensor(4.0)) == 4.0


@pytest.mark.parametrize(
    ("batch", "loss_fn", "error", "message"),
    [
        ((X, LABELS), None, ValueError, "needs loss_fn"),
        ((X, LABELS, X), lambda *_: X.sum(), ValueError, "got 3 items"),
        (3, None, TypeError, "got int"),
        (X, lambda out, _: out, ValueError, r"shape \(3,\)"),
        (X, lambda *_: 1.0, TypeError, "got float"),
        (X, "mse", TypeError, "loss_fn must be callable.*got str"),
    ],
)
def test_errors_say_what_was_wrong(batch, loss_fn, error, message):
    with pytest.raises(error, match=message):
        compute_loss(nn.Identity(), batch, loss_fn)


def test_a_loss_fn_that_cannot_be_called_is_found_before_the_model_runs():
    model = nn.Identity()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model must not run"))
    with pytest.raises(TypeError, match="callable"):
        compute_loss(model, X, 3)


def test_output_without_loss():
    with pytest.raises(ValueError, match="holds no loss"):
        compute_loss(TwoInputs(lambda loss: SimpleNamespace(logits=loss)), {"x": X, "labels": LABELS})
