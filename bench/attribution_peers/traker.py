"""TRAK by its authors: projected gradients of margins, one linear model for every checkpoint, averaged."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile

import torch
from torch import Tensor
from trak import TRAKer

from .job import Job, run

# Half as many numbers as digits: with more than samples (2,048, traker's default), Gram matrices are singular.
PROJECTED = 512


def trak(job: Job, *, states: str, count: int, regularization: float) -> Tensor:
    """``states`` is "checkpoints" of the run, the last ``count`` of them, or the "ensemble" from other seeds.

    Scores are of the margin ``log(p / (1 - p))``, which falls where the loss rises.
    """
    chosen = (job.checkpoints if states == "checkpoints" else job.ensemble)[-count:]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        tracer = TRAKer(
            copy.deepcopy(job.model),
            "image_classification",
            train_set_size=len(job.inputs),
            save_dir=folder,
            device="cpu",
            proj_dim=PROJECTED,
            use_half_precision=False,  # the default rounds features to fp16, for GPUs
            lambda_reg=regularization,
            logging_level=logging.ERROR,
        )
        for i, state in enumerate(chosen):
            tracer.load_checkpoint(state, model_id=i)
            tracer.featurize((job.inputs, job.labels), num_samples=len(job.inputs))
        tracer.finalize_features()
        for i, state in enumerate(chosen):
            tracer.start_scoring_checkpoint("queries", state, model_id=i, num_targets=len(job.test_inputs))
            tracer.score((job.test_inputs, job.test_labels), num_samples=len(job.test_inputs))
        return torch.as_tensor(tracer.finalize_scores("queries")).clone().t()


if __name__ == "__main__":
    run({"TRAK": trak})
