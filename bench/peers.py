"""Optimizers of other packages, to be measured beside ours; ``python -m bench.peers`` says which can run here.

Every peer gets torch's AdamW hyper-parameters, spelled out, because the packages' own defaults differ. A package is
imported when one of its peers is first asked for: none is a dependency, and several warn, log or compile on import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["FP32", "LOW_BIT", "Maker", "available", "data_folder", "usable"]

Maker = Callable[[list[nn.Parameter], float], Optimizer]

# `make bench-peers` installs here, off the environment's own path: pytest would load DeepSpeed and transformers would
# load torchao merely because they are installed.
FOLDER = Path(sys.prefix) / "peers"

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def _lazy(module: str) -> Any:
    """Import a peer's module, from the environment or from ``FOLDER``."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(module)


def data_folder(package: str) -> Path:
    """Where a package lies that brings data, found without importing it."""
    found = importlib.machinery.PathFinder.find_spec(package, [*sys.path, str(FOLDER)])
    if found is None or found.submodule_search_locations is None:
        raise ImportError(f"the data comes with {package}, which is not installed; try `make bench-peers`")
    return Path(found.submodule_search_locations[0])


def _deepspeed_cpu_adam(params: list[nn.Parameter], lr: float) -> Optimizer:
    if any(p.device.type != "cpu" for p in params):
        raise ValueError("DeepSpeedCPUAdam steps parameters on the CPU only")
    # Its operator is compiled on first use, by a ninja that pip puts beside the interpreter.
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    adam = _lazy("deepspeed.ops.adam")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return adam.DeepSpeedCPUAdam(params, lr=lr, **ADAMW)


def _optimi(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _lazy("optimi").AdamW(params, lr=lr, **ADAMW)


def _bitsandbytes_32bit(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _lazy("bitsandbytes.optim").AdamW32bit(params, lr=lr, **ADAMW)


def _bitsandbytes_8bit(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _lazy("bitsandbytes.optim").AdamW8bit(params, lr=lr, **ADAMW)


def _torchao_8bit(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _lazy("torchao.optim").AdamW8bit(params, lr=lr, **ADAMW)


def _torchao_4bit(params: list[nn.Parameter], lr: float) -> Optimizer:
    return _lazy("torchao.optim").AdamW4bit(params, lr=lr, **ADAMW)


# Same work as ours: fp32 parameters, gradients and moments.
FP32: dict[str, Maker] = {
    "DeepSpeedCPUAdam": _deepspeed_cpu_adam,
    "optimi AdamW": _optimi,
    "bitsandbytes AdamW32bit": _bitsandbytes_32bit,
}

# fp32 parameters and gradients, moments of 8 or 4 bits.
LOW_BIT: dict[str, Maker] = {
    "bitsandbytes AdamW8bit": _bitsandbytes_8bit,
    "torchao AdamW8bit": _torchao_8bit,
    "torchao AdamW4bit": _torchao_4bit,
}


@functools.cache
def _reason_against(make: Maker, device: torch.device) -> str | None:
    probe = nn.Parameter(torch.zeros(256, device=device))
    try:
        make([probe], 1e-4)
    except ModuleNotFoundError as missing:
        return f"{missing}; try `make bench-peers`"
    except Exception as error:  # a foreign package may fail in any way, and none is worth a benchmark run
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    return None


def available(
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    among: Iterable[str] = (*FP32, *LOW_BIT),
) -> dict[str, str | None]:
    """Why each peer cannot run on ``device``; None where it can.

    Building one tells: a package may be installed and yet lack its operator or its device. The first call compiles
    DeepSpeed's operator, which takes minutes; later processes find it in torch's extension cache.
    """
    makers = {**FP32, **LOW_BIT}
    return {name: _reason_against(makers[name], device) for name in among}


@functools.cache
def _say_once(name: str, reason: str) -> None:
    print(f"without {name}: {reason}", file=sys.stderr, flush=True)


def usable(peers: Mapping[str, Maker], device: torch.device) -> dict[str, Maker]:
    """Those of ``peers`` that run here; why the others do not goes to stderr, once per process."""
    reasons = available(device, peers)
    for name, reason in reasons.items():
        if reason is not None:
            _say_once(name, reason)
    return {name: make for name, make in peers.items() if reasons[name] is None}


if __name__ == "__main__":
    for peer, why_not in available().items():
        print(f"{peer:24} {why_not or 'ok'}")
