"""Influence functions of kronfluence: the Gauss-Newton matrix by Kronecker factors, and none for comparison."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from .job import Job, run

Batch = tuple[Tensor, Tensor]


class Classification(Task):
    """Sums of losses, as kronfluence wants them."""

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Of the labels, or of labels drawn from the model for the true Fisher matrix."""
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """The queries' loss."""
        return self.compute_train_loss(batch, model)


def influence(job: Job, *, strategy: str, damping: float | None, checkpoint: int) -> Tensor:
    """``damping=None`` is kronfluence's heuristic, a tenth of the mean eigenvalue."""
    model = copy.deepcopy(job.model)
    model.load_state_dict(job.checkpoints[checkpoint])
    task = Classification()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peer",
            prepare_model(model, task),
            task,
            cpu=True,
            output_dir=str(Path(folder)),
            disable_tqdm=True,
            disable_model_save=True,
        )
        analyzer.fit_all_factors(
            "factors",
            job.train_set(),
            per_device_batch_size=len(job.inputs),
            factor_args=FactorArguments(strategy=strategy),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=job.test_set(),
            train_dataset=job.train_set(),
            per_device_query_batch_size=len(job.test_inputs),
            per_device_train_batch_size=len(job.inputs),
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


if __name__ == "__main__":
    run({"influence": influence})
