"""Gradkern imports and trains with any one of its optional parts missing, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TRAIN = textwrap.dedent(
    """
    import importlib.abc, sys

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
            return None

    sys.meta_path.insert(0, Blocker())

    import torch
    import gradkern as gk

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for step in range(30):
        for rows in torch.arange(64).split(32):
            (torch.nn.functional.mse_loss(model(x[rows]), y[rows]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.nn.functional.mse_loss(model(x), y).item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert torch.isfinite(optimizer.grad_norm)
    assert not [name for name in BLOCKED if name in sys.modules]
    print(losses[-1].hex())
    """
)


def train(blocked: set[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"BLOCKED = {blocked!r}\n{TRAIN}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def with_everything() -> str:
    return train(set())


@pytest.mark.parametrize(
    "blocked",
    [
        {"triton"},
        {"transformers"},
        {"safetensors", "matplotlib", "PIL", "typer", "rich"},
    ],
    ids=lambda blocked: "+".join(sorted(blocked)),
)
def test_trains_alike_without(blocked: set[str], with_everything: str) -> None:
    assert train(blocked) == with_everything


def test_trains_alike_without_the_native_library(with_everything: str) -> None:
    assert train(set(), GRADKERN_NATIVE="0") == with_everything


def test_trains_alike_with_nothing_but_torch_and_numpy(with_everything: str) -> None:
    everything = {"triton", "transformers", "safetensors", "matplotlib", "PIL", "typer", "rich"}
    assert train(everything, GRADKERN_NATIVE="0") == with_everything


def test_import_loads_no_optional_package() -> None:
    program = textwrap.dedent(
        """
        import sys
        import torch
        before = set(sys.modules)
        import gradkern
        optional = {"triton", "transformers", "safetensors", "matplotlib", "PIL", "typer", "rich", "scipy"}
        print(sorted(optional & {name.partition(".")[0] for name in set(sys.modules) - before}))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
