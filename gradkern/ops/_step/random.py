"""The counter-based generator of stochastic rounding: a word is a hash of its counter under a key.

Its bits depend on (seed, step, parameter, offset) and nothing else, so they are the same for any number of threads,
after resuming, on every rank and on every backend. Two rounds of multiply and xor-shift (Mueller's construction, with
constants that Wellons' search found to have low bias).
"""

from __future__ import annotations

import torch

__all__ = ["key_of", "next_words", "random_words", "stir"]

_MASK = 0xFFFFFFFF
_MIX1, _MIX2, _SECOND = 0x21F0AAAD, 0x735A2D97, 0x9E3779B9


def _mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * _MIX1) & _MASK
    x = ((x ^ (x >> 15)) * _MIX2) & _MASK
    return x ^ (x >> 15)


def key_of(seed: int, step: int, param_id: int) -> int:
    """Key of one tensor and step, for its first 2^32 elements."""
    key = _mixed(seed & _MASK)
    for part in (seed >> 32, step, param_id, 0):
        key = _mixed(key ^ (part & _MASK))
    return key


def _mixed_words(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * _MIX1) & _MASK
    x = ((x ^ (x >> 15)) * _MIX2) & _MASK
    return x ^ (x >> 15)


def random_words(key: int, numel: int) -> torch.Tensor:
    """Words of elements 0 to ``numel``: int64 holding 32 bits, shape ``(numel,)``."""
    return _mixed_words(torch.arange(numel) ^ key)


def next_words(words: torch.Tensor) -> torch.Tensor:
    """A second word of the same elements."""
    return _mixed_words((words + _SECOND) & _MASK)


def stir(bits: torch.Tensor, key: int) -> torch.Tensor:
    """``bits`` (32 in int64) under a key, multiplied once."""
    return ((bits ^ key) * _MIX1) & _MASK
