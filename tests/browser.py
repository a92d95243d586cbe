"""Pages in a real browser: headless chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Loaded:
    """A page as the browser has it: the document after loading, and what it wrote to the console."""

    dom: str
    console: list[str]


def load(page: Path, tmp_path: Path, *, probe: str = "", width: int = 1280, dark: bool = False) -> Loaded:
    """Load a page from a file, with ``probe`` run in it as a script when everything is loaded."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (apt install chromium)")
    if probe:
        html = page.read_text(encoding="utf-8")
        # The page allows no script, so that of the test must be let in.
        assert html.count("default-src 'none';") == html.count("</body>") == 1
        html = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
        script = f'<script>addEventListener("load", () => {{ {probe} }});</script>'
        page = tmp_path / f"probed-{page.name}"
        page.write_text(html.replace("</body>", f"{script}</body>"), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--window-size={width},1000",
        f"--user-data-dir={tmp_path / 'profile'}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return Loaded(done.stdout, re.findall(r":CONSOLE\b.*?\] (.*)", done.stderr))
