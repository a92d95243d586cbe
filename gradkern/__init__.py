"""gradkern: everything between ``loss.backward()`` and the next forward pass."""

from __future__ import annotations

__version__ = "0.1.0"
