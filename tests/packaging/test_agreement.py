"""What the project says about itself in different places is the same thing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import gradkern

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader and tomli is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def requirement(project: dict[str, Any], name: str) -> Requirement:
    return next(found for found in map(Requirement, project["dependencies"]) if found.name == name)


def pinned(name: str) -> Version:
    text = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{name}==(\S+)", text, re.MULTILINE)
    return Version(version)


def test_python_versions_agree(project: dict[str, Any], workflow: dict[str, Any], readme: str) -> None:
    matrix = [Version(version) for version in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]]
    supported = SpecifierSet(project["requires-python"])
    assert SpecifierSet(f">={min(matrix)}") == supported
    assert f"Python ≥ {min(matrix)}" in readme
    makefile = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < ({min(matrix).major}, {min(matrix).minor})" in makefile
    assert f"Python >= {min(matrix)}" in makefile
    assert str(pyproject_tool("ruff")["target-version"]) == f"py{min(matrix).major}{min(matrix).minor}"
    assert pyproject_tool("mypy")["python_version"] == str(min(matrix))


def pyproject_tool(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][name]


def test_torch_versions_agree(project: dict[str, Any], workflow: dict[str, Any], readme: str) -> None:
    tested = pinned("torch")
    lower_bound = requirement(project, "torch")
    assert tested in lower_bound.specifier
    # The bound is the version that the suite is run with, no lower.
    assert str(lower_bound.specifier) == f">={tested.major}.{tested.minor}"
    assert f"torch {tested.major}.{tested.minor}" in workflow["jobs"]["test"]["name"]
    assert f"torch ≥ {tested.major}.{tested.minor}" in readme
    assert Version(torch.__version__).base_version == tested.base_version


def test_base_dependencies_are_torch_and_numpy(project: dict[str, Any]) -> None:
    assert {Requirement(line).name for line in project["dependencies"]} == {"torch", "numpy"}


def test_version_is_one_literal(project: dict[str, Any]) -> None:
    assert "version" in project["dynamic"]
    assert Version(gradkern.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[?([^\]\s]+)", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_installed_metadata_is_this_checkout() -> None:
    from importlib.metadata import metadata

    installed = metadata("gradkern")
    assert installed["Version"] == gradkern.__version__
    assert installed["License-Expression"] == "Apache-2.0"


def test_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_workflow_runs_what_anyone_can_run(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), "an action is pinned by its commit"
            elif step["run"] != ".ci/run":
                command, target = step["run"].split()
                assert command == "make"
                assert target in targets


def test_ci_script_ends_in_make_test() -> None:
    script = ROOT / ".ci/run"
    assert script.read_text().rstrip().endswith("exec make test")
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^  make (\S+)", shown, re.MULTILINE)) == set(phony.split())


def test_every_pin_is_exact_and_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    names = [pin.name.lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))
    # A local version would tie everyone to one build of torch.
    assert not any("+" in str(pin.specifier) for pin in pins)
