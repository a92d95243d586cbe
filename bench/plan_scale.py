"""How far planning goes: nested schedules of long chains, a model of 70 billion parameters, any length, the host."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import gradkern as gk
from gradkern.checkpoint._native_rotor import fastest_rotor
from gradkern.checkpoint._rotor import Stage, StageOption, simulate, solve_nested
from gradkern.errors import BudgetExceededError

from .harness import Report, interleave

__all__ = ["any_length", "nested", "offloading", "seventy_billion"]

STAGES = (100, 300)
OPTIONS = 8
LENGTHS = 1000
LONGEST = 256

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

# 16 of its 32 layers.
LLAMA_8B_HALF = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def nested(report: Report, rounds: int) -> None:
    """Seconds of a schedule by the rotor recurrence, and whether what it found needs what it said."""
    for count in STAGES:
        stages = _random_stages(count)
        # Between all inputs held at a time and everything kept.
        held = [max(option.saved_bytes for option in stage.options) for stage in stages]
        capacity = sum(held) // 4
        systems: dict[str, Callable[[], object]] = {
            "gradkern": partial(solve_nested, stages, capacity, table=fastest_rotor())
        }
        case = f"nested, {count} stages x {OPTIONS}"
        report.add_times(case, "solve", interleave(systems, report.device, rounds=rounds), systems)
        solution = solve_nested(stages, capacity, table=fastest_rotor())
        assert solution is not None
        report.add(case, "gradkern", "peak_of_capacity", 100 * simulate(stages, solution.schedule)[0] / capacity, "%")


def _seconds(plans: gk.checkpoint.ShapePlans, length: int) -> float:
    """Of a choice for a length, as if it had not been asked for before."""
    plans._chosen.pop(length, None)
    start = time.perf_counter()
    plans.at(length)
    return time.perf_counter() - start


def _random_stages(count: int) -> list[Stage]:
    drawn = random.Random(count)
    stages = []
    for _ in range(count):
        size, seconds = drawn.randrange(10**6, 10**7), drawn.random()
        options = []
        for k in range(OPTIONS):
            saved = size * (2 + 3 * k)
            options.append(StageOption(saved, saved + size, saved + 3 * size, seconds, seconds * (3 - k / OPTIONS)))
        stages.append(Stage(size, seconds, 3 * size, size, tuple(options), size))
    return stages


def seventy_billion(report: Report) -> None:
    """Seconds and resident memory of ``gradkern plan`` for a Llama of 70 billion parameters on 64 GPUs."""
    case = "llama 70B, 64 x H100"
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "plan.json"
        config.write_text(json.dumps(LLAMA_70B))
        options = ["--gpu", "H100", "--budget", "40GiB", "--batch", "1x4096", "--shards", "64", "--out", str(out)]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "gradkern", "plan", str(config), *options],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        made = gk.checkpoint.Plan.load(out)
    report.add(case, "gradkern", "plan_seconds", seconds, "s")
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report.add(case, "gradkern", "largest_resident_of_any_child", resident, "GiB")
    report.add(case, "gradkern", "units", len(made.units), "")
    report.add(case, "gradkern", "modelled_peak", made.predicted_peak_bytes / 2**30, "GiB")
    report.add(case, "gradkern", "modelled_more_time", 100 * made.extra_s / made.step_s, "%")


def offloading(report: Report) -> None:
    """What waiting on the host saves of the time that recomputing adds; all of it modelled."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_8B_HALF)).to(torch.bfloat16)
        ids = torch.zeros(2, 4096, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters())
    for gpu in ("H100", "RTX4090"):
        make = partial(gk.checkpoint.plan, model, batch, optimizer=optimizer, gpu=gpu, shards=8)
        free = make(budget="1000 GiB")
        for share in (0.3, 0.6):
            budget = free.least_feasible_bytes + int(share * (free.natural_peak_bytes - free.least_feasible_bytes))
            without, made = make(budget=budget), make(budget=budget, offload=True)
            case = f"half a llama 8B, {gpu}, modelled, {share:.0%} between least and natural"
            report.add(case, "gradkern", "more_time_without_offload", 100 * without.extra_s / without.step_s, "%")
            report.add(case, "gradkern", "more_time_with_offload", 100 * made.extra_s / made.step_s, "%")
            report.add(case, "gradkern", "offloaded_units", len(made.offloads), "")
            removed = 1 - made.extra_s / without.extra_s if without.extra_s else 0.0
            report.add(case, "gradkern", "recompute_time_removed", 100 * removed, "%")


def any_length(report: Report) -> None:
    """A thousand batches of random lengths, each under a cap, planned from three that were measured."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=6, n_embd=64, n_head=4, vocab_size=256, n_positions=LONGEST, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 256, (2, length))
        return {"input_ids": ids, "labels": ids}

    def step(inputs: dict[str, torch.Tensor]) -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    longest = batch(LONGEST)
    free = gk.checkpoint.plan(model, longest, budget="1 GiB", optimizer=optimizer)
    budget = (2 * free.least_feasible_bytes + free.natural_peak_bytes) // 3
    shapes = [LONGEST // 4, LONGEST // 2, LONGEST]
    plans = gk.checkpoint.plan(model, longest, budget=budget, optimizer=optimizer, shapes=shapes)
    step(longest)  # makes the optimizer's state
    drawn = random.Random(0)
    slowest, violations, recomputed = 0.0, 0, 0
    for _ in range(LENGTHS):
        length = drawn.randrange(1, LONGEST + 1)
        # Of three equal choices the quickest: what else the machine does decides the slowest of a thousand.
        slowest = max(slowest, min(_seconds(plans, length) for _ in range(3)))
        made = plans.at(length)
        plans.apply(model, length)
        recomputed += any(unit.option != "keep" for unit in made.units)
        inputs = batch(length)
        try:
            with gk.checkpoint.enforce(budget, model=model, optimizer=optimizer):
                step(inputs)
        except BudgetExceededError:
            optimizer.zero_grad()
            violations += 1
    case = f"gpt2, {LENGTHS} lengths"
    report.add(case, "gradkern", "budget_violations", violations, "")
    report.add(case, "gradkern", "slowest_choice", 1e3 * slowest, "ms")
    report.add(case, "gradkern", "recomputes", 100 * recomputed / LENGTHS, "%")
