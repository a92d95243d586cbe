"""Files of tensors that are complete under their name or absent, also when the power goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import Tensor

__all__ = ["load_tensors", "safetensors_torch", "sync_folder", "write_tensors", "write_whole"]


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as safetensors by :func:`write_whole`; returns the bytes."""
    content: bytes = safetensors_torch().save({key: tensor.contiguous() for key, tensor in tensors.items()})
    write_whole(target, content)
    return content


def load_tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors in what :func:`write_tensors` wrote.

    Raises:
        ValueError: It is something else.
    """
    library = safetensors_torch()
    from safetensors import SafetensorError

    try:
        loaded: dict[str, Tensor] = library.load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return loaded


def write_whole(target: Path, content: bytes) -> None:
    """Write under a temporary name, sync, rename, and sync the folder."""
    temporary = target.with_suffix(".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_torch() -> ModuleType:
    """The optional file format, loaded on first use so that the package imports without it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "gradkern.rollback stores ledgers with safetensors, which is not installed; install it with "
            "pip install 'gradkern[rollback]'"
        ) from error
    return safetensors.torch
