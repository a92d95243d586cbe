"""What of gradkern works here: versions, instruction set, and each backend with the reason where it is off."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import gradkern
from gradkern import _native
from gradkern.checkpoint import allocator_unavailable_reason
from gradkern.ops import _registry

__all__ = ["report"]

_EXTRAS = ("numpy", "safetensors", "typer", "rich", "matplotlib", "transformers", "triton")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _flushes_subnormals() -> bool:
    smallest = torch.full((16,), torch.finfo(torch.float32).smallest_normal)
    return bool((smallest * 0.5 == 0).any())


def report() -> str:
    """Return the report as text."""
    lines = [
        f"gradkern      {gradkern.__version__}",
        f"python        {platform.python_version()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        *(f"{package:13} {_version(package)}" for package in _EXTRAS),
        f"cpu isa       {_native.isa() or 'none: ' + str(_native.unavailable_reason())}",
        f"subnormals    {'flushed to zero: bits may differ between backends' if _flushes_subnormals() else 'kept'}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        for backend in _registry.BACKENDS:
            reason = _registry.unavailable_reason(backend, device)
            lines.append(f"{device.type:4} {backend:9} {'on' if reason is None else 'off: ' + reason}")
    reason = allocator_unavailable_reason()
    lines.append(f"allocator     {'on' if reason is None else 'off: ' + reason}")
    return "\n".join(lines)
