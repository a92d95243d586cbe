from __future__ import annotations

import sys
from pathlib import Path

# The examples are scripts, not a package: they import their parts from beside themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
