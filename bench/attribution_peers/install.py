"""Makes every peer's virtual environment: ``python -m bench.attribution_peers.install`` (``make bench-attribution``).

A peer is installed without its dependencies: what it imports is pinned beside it, or is seen in the environment that
runs this, torch above all. So that no peer brings another build of torch, and none is copied.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

__all__ = ["REQUIREMENTS", "VENVS", "install", "interpreter"]

VENVS = Path(sys.prefix) / "attribution"
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


def interpreter(peer: str) -> Path:
    """That of a peer's environment."""
    return VENVS / peer / "bin" / "python"


def install(peer: str) -> bool:
    """Make a peer's environment anew; whether pip succeeded, which says on stderr why it did not."""
    folder = VENVS / peer
    venv.create(folder, clear=True, with_pip=False)
    # A path file is read after the environment's own packages, which therefore win.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "main_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter(peer)]
    command = [*pip, "install", "--quiet", "--no-deps", "-r", REQUIREMENTS / f"{peer}.txt"]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    # One that fails keeps none of the others from being measured.
    failed = [peer for peer in sorted(path.stem for path in REQUIREMENTS.glob("*.txt")) if not install(peer)]
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}")
