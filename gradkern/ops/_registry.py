"""Which implementation of an op runs: chosen by device, or asked for by name, never silently replaced."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from gradkern import _native
from gradkern.errors import BackendUnavailableError
from gradkern.ops._spec import Backend, OpSpec

__all__ = ["BACKENDS", "SPECS", "backend_for", "register", "select", "unavailable_reason", "use_backend"]

BACKENDS = ("reference", "native", "triton")
SPECS: dict[str, OpSpec] = {}

_LIBRARY = torch.library.Library("gradkern", "FRAGMENT")
_FORCED: ContextVar[str | None] = ContextVar("gradkern_backend", default=None)


def register(spec: OpSpec) -> OpSpec:
    """Declare an op to torch and remember its specification."""
    _LIBRARY.define(f"{spec.name}{spec.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, spec.traceable, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradkern::{spec.name}", spec.fake, lib=_LIBRARY)
    SPECS[spec.name] = spec
    return spec


@cache
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``; None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device.type != "cpu":
            return f"native kernels run on the CPU, the tensors are on {device}"
        return _native.unavailable_reason()
    if device.type == "meta":
        return "tensors on the meta device have no memory for a kernel to read"
    reason = _triton_reason()
    if reason is not None:
        return reason
    if device.type == "cpu":
        import triton.knobs

        if not triton.knobs.runtime.interpret:
            return "Triton runs on the CPU only in its interpreter (set TRITON_INTERPRET=1 before import)"
    return None


def _load_triton(spec: OpSpec) -> Backend:
    module, function = spec.triton.split(":")
    backend: Backend = getattr(importlib.import_module(module), function)
    return backend


@cache
def _backend(caller: str, device_type: str, forced: str | None) -> str:
    device = torch.device(device_type)
    if forced is None:
        preferred = "native" if device.type == "cpu" else "triton"
        return preferred if unavailable_reason(preferred, device) is None else "reference"
    reason = unavailable_reason(forced, device)
    if reason is not None:
        raise BackendUnavailableError(
            f"{caller}: backend {forced!r} cannot run here: {reason}; choose another of {', '.join(BACKENDS)}, "
            "or none for the best available"
        )
    return forced


@cache
def _resolve(spec: OpSpec, device_type: str, forced: str | None) -> Backend:
    name = _backend(spec.name, device_type, forced)
    if name == "triton":
        return _load_triton(spec)
    return spec.native if name == "native" else spec.reference


def select(spec: OpSpec, device: torch.device) -> Backend:
    """The implementation that runs ``spec`` on ``device``.

    Raises:
        BackendUnavailableError: A backend was forced by ``use_backend`` that cannot run there.
    """
    return _resolve(spec, device.type, _FORCED.get())


def backend_for(caller: str, device: torch.device) -> str:
    """The name of the backend that something runs on which is no registered op, ``caller`` in errors.

    Raises:
        BackendUnavailableError: As :func:`select`.
    """
    return _backend(caller, device.type, _FORCED.get())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` on backend ``name``: ``reference``, ``native`` or ``triton``.

    Raises:
        ValueError: No backend has that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)
