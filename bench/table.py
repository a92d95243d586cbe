"""Published records as the Markdown table of the README: ``python -m bench.table``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "SUITES", "published", "readme_table"]

RESULTS = Path(__file__).resolve().parent / "results"
SUITES = ("cycle", "accumulate", "train", "state8")

Records = Sequence[dict[str, Any]]

_CASES = {
    "gpt2_124m": "GPT-2 124M shapes, 148 tensors",
    "small_1500": "1,500 small tensors, 2.3 M",
    "large_8x4096x4096": "8 × 4096², 134 M",
}
_TRAININGS = {
    "many_tensors_1500": "MLP of 1,500 tensors",
    "gpt2_124m": "GPT-2 small, one row of 128 tokens",
    "demo": "the demo's model, 4 micro-batches",
}
_CLIP_STEP = {
    "torch clip + fused": "clip + AdamW; torch: `clip_grad_norm_` + fused",
    "torch grad_scale + fused": "clip + AdamW; torch: norm + `grad_scale` + fused",
    "torch clip + DeepSpeedCPUAdam": "clip + AdamW; DeepSpeedCPUAdam after torch's clipping",
}


def published() -> dict[str, Records]:
    """Records of the suites that the README shows."""
    return {suite: json.loads((RESULTS / f"{suite}.json").read_text()) for suite in SUITES}


def readme_table(results: Mapping[str, Records]) -> str:
    """Our time beside the others', for parts, cycles and whole training steps, with the conditions below."""
    values = {(r["suite"], r["case"], r["system"], r["metric"]): r["value"] for rs in results.values() for r in rs}
    rows = ["| ms, the best of interleaved rounds | gradkern | other | ratio |", "|---|---|---|---|"]

    def row(label: str, ours: float, theirs: float) -> None:
        digits = 1 if ours < 1000 else 0
        rows.append(f"| {label} | {ours:.{digits}f} | {theirs:.{digits}f} | {theirs / ours:.2f} |")

    def best(suite: str, case: str, metric: str) -> float:
        return min(
            v for (s, c, system, m), v in values.items() if (s, c, m) == (suite, case, metric) and "torch" in system
        )

    for case, label in _CASES.items():
        for system, what in _CLIP_STEP.items():
            if ("cycle", case, system, "clip_step_min") in values:
                ours = values["cycle", case, "gradkern", "clip_step_min"]
                row(f"{label}: {what}", ours, values["cycle", case, system, "clip_step_min"])
        for count in (1, 8):
            metric = f"cycle_bf16_k{count}_min"
            micro_batches = "1 bf16 micro-batch" if count == 1 else f"{count} bf16 micro-batches"
            ours = values["accumulate", case, "gradkern", metric]
            row(f"{label}: {micro_batches} into fp32, clip, step, zero", ours, best("accumulate", case, metric))
    for case, label in _TRAININGS.items():
        ours = values["train", case, "gradkern", "train_step_min"]
        row(f"{label}: forward, backward, update", ours, best("train", case, "train_step_min"))
    case = "large_6x4096x4096"
    ours = values["state8", case, "gradkern int8", "step_min"]
    for system in ("torch fused fp32", "bitsandbytes AdamW8bit", "torchao AdamW8bit"):
        if ("state8", case, system, "step_min") in values:
            row(f"6 × 4096², 8-bit state; {system}", ours, values["state8", case, system, "step_min"])

    env = results["cycle"][0]["env"]
    rows += [
        "",
        f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}, fp32 unless said; torch's best "
        "way counts where none is named.",
    ]
    for case, label in _CASES.items():
        if case == "small_1500":  # fits the cache: who comes second finds it warm
            continue
        share = values["cycle", case, "gradkern", "accumulate_float32_share_of_triad"]
        costs = [
            100 * (values["cycle", case, "gradkern + norm / gradkern", f"accumulate_{dtype}_norm_cost"] - 1)
            for dtype in ("float32", "bfloat16")
        ]
        rows[-1] += (
            f" {label}: accumulation runs at {share:.0f} % of the triad; "
            f"the norm adds {round(costs[0])} % to it (fp32), {round(costs[1])} % (bf16)."
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(readme_table(published()), end="")
