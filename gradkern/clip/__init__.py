"""Gradient norms and clipping: functions with torch's signatures, and policies that optimizers take as ``clip=``."""

from __future__ import annotations

from gradkern.clip.adaptive import AutoClip, SkipOnSpike, ZClip
from gradkern.clip.elementwise import AGC, Value
from gradkern.clip.global_norm import GlobalNorm, GroupNorm
from gradkern.clip.norms import clip_grad_norm_, get_total_norm
from gradkern.clip.policy import ClipPolicy

__all__ = [
    "AGC",
    "AutoClip",
    "ClipPolicy",
    "GlobalNorm",
    "GroupNorm",
    "SkipOnSpike",
    "Value",
    "ZClip",
    "clip_grad_norm_",
    "get_total_norm",
]
