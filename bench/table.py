"""Published records as the Markdown table of the README: ``python -m bench.table bench/results/cycle.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["readme_table"]

_CASES = {
    "gpt2_124m": "GPT-2 124M shapes, 148 tensors",
    "small_1500": "1,500 small tensors, 2.3 M",
    "large_8x4096x4096": "8 × 4096², 134 M",
}


def readme_table(records: Sequence[dict[str, Any]]) -> str:
    """Times of clip + step and of the whole cycle, ours beside torch's, with the conditions below."""
    values = {(r["case"], r["system"], r["metric"]): r["value"] for r in records}
    rows = [
        "| ms, the best of interleaved rounds | gradkern | torch | ratio |",
        "|---|---|---|---|",
    ]
    for case, label in _CASES.items():
        for what, metric, torch_system in (
            ("clip + AdamW", "clip_step_min", "torch clip + fused"),
            ("clip + AdamW, torch's `grad_scale` trick", "clip_step_min", "torch grad_scale + fused"),
            ("4 micro-batches by `add_`, clip, step, zero", "cycle_k4_min", "torch add_ + clip + fused"),
            ("4 micro-batches by `_foreach_add_`", "cycle_k4_min", "torch _foreach_add_ + clip + fused"),
        ):
            ours, theirs = values[case, "gradkern", metric], values[case, torch_system, metric]
            rows.append(f"| {label}: {what} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")
    env = records[0]["env"]
    rows += [
        "",
        f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}, fp32; "
        "`python -m bench cycle --json out/cycle.json`.",
    ]
    for case, label in _CASES.items():
        if case == "small_1500":  # fits the cache: who comes second finds it warm
            continue
        share = values[case, "gradkern", "accumulate_float32_share_of_triad"]
        costs = [
            100 * (values[case, "gradkern + norm / gradkern", f"accumulate_{dtype}_norm_cost"] - 1)
            for dtype in ("float32", "bfloat16")
        ]
        rows[-1] += (
            f" {label}: accumulation runs at {share:.0f} % of the triad; "
            f"the norm adds {costs[0]:.0f} % to it (fp32), {costs[1]:.0f} % (bf16)."
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(readme_table(json.loads(Path(sys.argv[1]).read_text())), end="")
