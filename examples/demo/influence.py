"""The question at the end: what does the model say, and which training snippets are behind it."""

from __future__ import annotations

import torch
from transformers import GPT2LMHeadModel

import gradkern as gk

from .corpus import Corpus, readable
from .figures import Influential, Prediction
from .model import continue_text

__all__ = ["explain_continuation"]

_MARKER = "\n    def __init__(self"
_TEMPERATURE = 0.8
_SNIPPETS = 5
# Positions whose label has this value are left out of the loss (torch's ``cross_entropy``).
_IGNORED = -100


def explain_continuation(
    ledger: gk.rollback.Ledger, model: GPT2LMHeadModel, corpus: Corpus, *, seed: int
) -> Prediction:
    """Continue a held-out prompt to a full row and name the snippets that made the continuation likely.

    Args:
        ledger: Of the run that trained ``model``.
        model: As the run left it.
        corpus: Of the run; half a row of a held-out file is the prompt.
        seed: Seed of the sampling.
    """
    prompt = corpus.held_out_prompt(_MARKER, corpus.length // 2)
    prompt_ids = torch.tensor(list(prompt.data))
    continuation = continue_text(
        model, prompt_ids, count=corpus.length - len(prompt_ids), temperature=_TEMPERATURE, seed=seed
    )
    input_ids = torch.cat([prompt_ids, continuation])[None]
    labels = input_ids.clone()
    # The question is about what the model said, not about what it was given.
    labels[:, : len(prompt_ids)] = _IGNORED
    found = ledger.explain(model, {"input_ids": input_ids, "labels": labels}, k=_SNIPPETS)
    return Prediction(
        prompt=prompt,
        continuation=readable(bytes(continuation.tolist())),
        influences=tuple(Influential(hit.id, hit.score, corpus.snippet(hit.id)) for hit in found),
    )
