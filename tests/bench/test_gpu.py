"""The GPU evidence: launches counted, bytes read out of compiled kernels, times marked as modelled."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


# Read and written: of a parameter with its remainder (an fp32 master is read in the parameter's place), of a state.
PARAM_BYTES = {0: 4 + 4, 1: 2 + 2, 2: 2 + 2, 3: 4 + 4 + 2, 4: 4 + 4 + 2, 5: 4 + 4, 6: 3 + 3, 7: 2 + 2}
STATE_BYTES = {0: 8, 1: 4, 2: 4, 7: 4, 8: 2 + 2 / 64}


def least_bytes(case):
    """What the codecs named in a case of the suite must move for one parameter."""
    op, *settings = case.split()
    code = {name: int(value) for name, value in (s.split("=") for s in settings)}
    states = {"adamw_step_": 2 + code["VARIANT"] % 2, "lion_step_": 1, "sgd_step_": code["VARIANT"] % 2}[op]
    return PARAM_BYTES[code["PARAM"]] + (4 if code["GRAD"] == 0 else 2) + states * STATE_BYTES[code["STATE"]]


def test_every_clipped_step_is_two_launches_and_a_micro_batch_one():
    counts = gpu.count_launches((1, 148))  # the suite itself counts 1,500 too, which takes a minute
    steps = {case: launches for case, launches in counts.items() if "clip + step" in case}
    assert {"AdamW clip + step, 1 tensors", "AdamW clip + step, 148 tensors"} <= steps.keys()
    assert set(steps.values()) == {2}
    assert {launches for case, launches in counts.items() if case.startswith("accumulate")} == {1}


def test_compiled_steps_move_what_the_codecs_must_and_no_more():
    program = textwrap.dedent(
        """
        import json
        from bench import gpu
        from gradkern.ops._triton.launch import TARGETS
        from gradkern.testing.machine_code import all_variants, read

        wanted = {  # parameter, gradient, state: bytes of each, read and written
            ("adamw_step_", 0, 0, 0): 4 + 4 + 4 + 2 * (4 + 4),
            ("adamw_step_", 5, 0, 0): 2 * (2 + 2) + 4 + 2 * (4 + 4),
            ("adamw_step_", 3, 0, 0): 4 + 4 + 2 + 4 + 2 * (4 + 4),
            ("adamw_step_", 0, 0, 8): 4 + 4 + 4 + 2 * (1 + 1) + 4 / 64,
            ("lion_step_", 0, 0, 0): 4 + 4 + 4 + 2 * 4,
        }
        seen = {}
        for op, variant in all_variants():
            c = variant.constants
            key = op, c.get("PARAM"), c.get("GRAD"), c.get("STATE")
            if key in wanted and c["VARIANT"] == 0 and c["TRANSFORM"] == 0 and key not in seen:
                code = read(variant, TARGETS[1])
                seen[key] = gpu.bytes_per_param(code, c["STATES"] if c["STATE"] == 8 else 0), wanted[key]
        assert seen.keys() == wanted.keys(), wanted.keys() - seen.keys()
        print(json.dumps(list(seen.values())))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for moved, floor in json.loads(done.stdout.splitlines()[-1]):
        assert moved == floor


def test_a_modelled_time_is_bytes_over_bandwidth_and_launches():
    assert gpu.modelled_us(0.9 * 3350e9, 3350) == pytest.approx(1e6 + 8)
    assert gpu.modelled_us(0, 3350) == 8


def test_the_published_run_has_every_fact_of_every_kernel():
    records = json.loads((ROOT / "bench" / "results" / "gpu.json").read_text())
    facts = {(r["case"], r["system"], r["metric"]): r["value"] for r in records}
    assert len(facts) == len(records)
    metrics = {"registers", "spill_bytes", "local_bytes", "hot_access_bits", "occupancy"}
    kernels = {case for case, system, _ in facts if system == "sm_90"}
    for case in kernels:
        for system in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"):
            assert {m for c, s, m in facts if (c, s) == (case, system)} >= metrics
    assert all(r["unit"] == "us (modelled)" for r in records if r["metric"] == "modelled_us")
    for (case, system, metric), value in facts.items():
        if metric == "bytes_per_param":
            assert value == least_bytes(case), (case, system)
    steps = {case: value for (case, _, metric), value in facts.items() if metric == "launches_per_step"}
    assert steps["AdamW clip + step, 1500 tensors"] == steps["AdamW clip + step, 1 tensors"] == 2
