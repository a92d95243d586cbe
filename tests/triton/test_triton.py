"""Triton kernels in the interpreter (same bits as the reference) and compiled ahead of time (machine code read).

Each in a process of its own: interpreter and compiler cannot share one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, str(HERE / script)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_interpreter_has_the_bits_of_the_reference():
    assert "compared" in run("interpreter_parity.py", TRITON_INTERPRET="1")


def test_recording_in_the_interpreter_has_the_bits_of_the_reference():
    assert "compared" in run("record_parity.py", TRITON_INTERPRET="1")


def test_machine_code_of_every_kernel_on_every_target():
    assert "inspected" in run("ahead_of_time.py", TRITON_INTERPRET="0")
