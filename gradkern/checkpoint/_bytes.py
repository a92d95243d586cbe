"""Byte budgets as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"b": 1}
for _power, _prefix in enumerate("kmgtp", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power

_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Read a size in bytes.

    Args:
        size: A positive ``int`` (bytes) or text such as ``"512 MiB"``, ``"2GB"``, ``"1.5 GiB"`` or
            ``"4096"``. ``kB, MB, GB, TB, PB`` are powers of 1000 and ``KiB, MiB, GiB, TiB, PiB`` powers of
            1024, in any case; without a unit the number counts bytes.

    Returns:
        The size in bytes; a fraction of a byte is dropped.

    Raises:
        TypeError: ``size`` is neither ``int`` nor ``str`` (``bool`` and ``float`` are refused too).
        ValueError: The text does not parse, or the size is below one byte.

    Example:
        >>> parse_bytes("512 MiB"), parse_bytes("2GB")
        (536870912, 2000000000)
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"a size must be an int (bytes) or text such as '512 MiB', got {type(size).__name__} {size!r}")
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match["unit"].lower() or "b" if match else ""
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"cannot read {size!r} as a size; expected a positive number with an optional unit out of "
                "B, kB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB, e.g. '512 MiB'"
            )
        nbytes = int(Decimal(match["number"]) * _UNITS[unit])
    else:
        nbytes = size
    if nbytes < 1:
        raise ValueError(f"a size must be at least one byte, got {size!r}")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Write a size for people, in the largest binary unit that keeps it at or above one."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(nbytes) >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{nbytes} B"
