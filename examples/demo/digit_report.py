"""A page on who taught the model its worst mistakes: wrong labels among them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.errors import UnstableInfluenceError

from .digits import SIDE
from .noisy_labels import Run

__all__ = ["write_report"]

_QUERIES = 20


def write_report(path: Path, run: Run) -> None:
    """Show the test digits with the highest loss, and the training samples that helped and harmed them most."""
    digits, model = run.digits, run.model
    with torch.no_grad():
        outputs = model(digits.test_images)
    losses = nn.functional.cross_entropy(outputs, digits.test_labels, reduction="none")
    worst = losses.topk(_QUERIES).indices
    queries = [(digits.test_images[i : i + 1], digits.test_labels[i : i + 1]) for i in worst.tolist()]
    said, true = outputs.argmax(1)[worst].tolist(), digits.test_labels[worst].tolist()

    def show(id: int) -> tuple[Tensor, str]:
        given, right = int(digits.given[id]), int(digits.true[id])
        return _paper(digits.images[id]), f"label {given}" if given == right else f"label {given}, is a {right}"

    estimator = "ref"
    try:
        scores = run.ledger.scores(model, queries, loss_fn=nn.functional.cross_entropy, estimator=estimator)
    except UnstableInfluenceError:
        estimator = "direct"
        scores = run.ledger.scores(model, queries, loss_fn=nn.functional.cross_entropy, estimator=estimator)
    run.ledger.report(
        path,
        scores,
        show=show,
        queries=[
            (_paper(digits.test_images[i]), f"is a {right}, taken for a {taken}" if taken != right else f"is a {right}")
            for i, taken, right in zip(worst.tolist(), said, true, strict=True)
        ],
        title=f"Who taught the model its {_QUERIES} worst mistakes? ({estimator})",
        verified=run.ledger.verify(model),
    )


def _paper(image: Tensor) -> Tensor:
    """Black on white."""
    return 1 - image.reshape(SIDE, SIDE)
