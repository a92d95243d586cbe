"""Every environment variable that gradkern reads, parsed once, in one place.

============================ ===========================================================================
``GRADKERN_NATIVE``          ``0``: do not load the native library. Anything else or unset: load it if built.
                             (At build time ``setup.py`` reads it too: ``0`` never builds, ``1`` must build.)
``GRADKERN_CPU_ISA``         ``baseline``, ``avx2``, ``avx512`` or ``neon``: run the CPU loops on that
                             instruction set. Unset: the widest that the CPU has.
============================ ===========================================================================
"""

from __future__ import annotations

import os

__all__ = ["cpu_isa", "native_wanted"]

_ISAS = ("baseline", "avx2", "avx512", "neon")


def native_wanted() -> bool:
    """Whether the native library may be loaded."""
    return os.environ.get("GRADKERN_NATIVE", "auto") != "0"


def cpu_isa() -> str | None:
    """The instruction set asked for, or None.

    Raises:
        ValueError: The variable names no instruction set that gradkern knows.
    """
    wanted = os.environ.get("GRADKERN_CPU_ISA")
    if wanted is not None and wanted not in _ISAS:
        raise ValueError(
            f"GRADKERN_CPU_ISA is {wanted!r}, expected one of {', '.join(_ISAS)}; unset it to choose automatically"
        )
    return wanted
