"""The model of the demo: GPT-2's architecture over bytes, from random weights."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["build_model", "continue_text", "mean_loss"]

_BYTE_VALUES = 256
_HEAD_WIDTH = 32


def build_model(*, layers: int, width: int, length: int, seed: int) -> GPT2LMHeadModel:
    """Build a GPT-2 whose vocabulary is the 256 byte values.

    Args:
        layers: Number of blocks.
        width: Embedding width; a multiple of 32, the width of a head.
        length: Longest input in bytes.
        seed: Seed of the weights.

    Raises:
        ValueError: If ``width`` is not a positive multiple of 32.
    """
    if width <= 0 or width % _HEAD_WIDTH:
        raise ValueError(f"build_model: width must be a positive multiple of {_HEAD_WIDTH}, got {width}")
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=_BYTE_VALUES,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=width // _HEAD_WIDTH,
        # Without dropout a recomputed block is the same block, and the timing compares like with like.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        # The cache of keys and values is for generation; in training it only holds memory.
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    # Said by name, because transformers warns where it has to guess.
    model.loss_type = "ForCausalLM"
    return model


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    """Return the mean loss over rows, in nats per byte."""
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in rows.split(4)]
    return float(torch.stack(losses).sum()) / len(rows)


@torch.no_grad()
def continue_text(
    model: GPT2LMHeadModel, prompt: torch.Tensor, *, count: int, temperature: float, seed: int
) -> torch.Tensor:
    """Sample bytes after a prompt.

    Args:
        model: The model.
        prompt: Byte values, shape ``(length,)``.
        count: Bytes to sample.
        temperature: Below 1 prefers what the model finds likely.
        seed: Seed of the sampling.

    Returns:
        The sampled bytes, shape ``(count,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    text = prompt
    for _ in range(count):
        window = text[-model.config.n_positions :]
        logits = model(input_ids=window[None]).logits[0, -1]
        probabilities = (logits / temperature).softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)])
    return text[len(prompt) :]
