"""``python -m gradkern`` and the command ``gradkern``: ``info`` always, the others with the extra ``cli``."""

from __future__ import annotations

import importlib.util
import sys

from gradkern.info import report

__all__ = ["main"]


def main() -> None:
    """Entry point."""
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        from gradkern.command_line import app  # lazy: needs the extra

        app(prog_name="gradkern")
    elif sys.argv[1:] == ["info"]:
        print(report())  # noqa: T201  this is what the command is for
    else:
        sys.exit("gradkern: commands other than info need typer and rich; pip install 'gradkern[cli]'")


if __name__ == "__main__":
    main()
