"""Builds the native library; all metadata is in pyproject.toml.

``GRADKERN_NATIVE=auto`` (default) builds where torch and a C++ compiler are found and installs pure Python otherwise;
``1`` fails loudly instead, ``0`` never builds. Two shared objects come out: ``_C.so``, the operators over torch's
stable ABI, and ``_alloc.so``, the allocator hook, which links libc10 and is tied to torch's minor version.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
# -ffp-contract=off: GCC fuses multiply-adds only where the instruction set has them, which changes bits.
FLAGS = (
    "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wextra"
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12 warns inside its own AVX-512 headers
)


def reasons_against() -> list[str]:
    """Why the native library cannot be built here; empty when it can."""
    reasons = []
    if platform.system() != "Linux":
        reasons.append(f"the native build supports Linux, this is {platform.system()}")
    try:
        import torch  # noqa: F401
    except ImportError:
        reasons.append("torch is not importable (build with --no-build-isolation)")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        reasons.append("no C++ compiler (apt install g++, or set CXX)")
    if shutil.which("ninja") is None:
        reasons.append("ninja is missing (pip install ninja)")
    return reasons


def ninja_file(build: Path, out: Path) -> str:
    """The build graph: one edge per object and per library."""
    import torch

    torch_dir = Path(torch.__file__).parent
    include = f"-isystem {torch_dir / 'include'}"
    stable = "-DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $libs -o $out",
    ]

    def library(name: str, sources: list[str], flags: str, libs: str) -> None:
        objects = []
        for source in sources:
            obj = build / (source.replace("/", "_") + ".o")
            lines.extend([f"build {obj}: compile {ROOT / source}", f"  flags = {FLAGS} {flags}"])
            objects.append(str(obj))
        links = f"-L{torch_dir / 'lib'} {libs}"
        lines.extend([f"build {out / name}: link {' '.join(objects)}", f"  libs = {links}"])

    operators = ("ops", "norm_ops", "step_ops", "plan_ops", "rollback_ops")
    sources = [*(f"csrc/{name}.cpp" for name in operators), "csrc/cpu/isa.cpp"]
    library("_C.so", sources, f"{include} {stable}", "-ltorch_cpu -lc10")
    # nodelete: memory that the hook handed out may outlive every reference to the library.
    library("_alloc.so", ["csrc/alloc/alloc.cpp"], f"{include} {abi}", "-lc10 -Wl,-z,nodelete")
    return "\n".join(lines) + "\n"


def build_native() -> bool:
    """Build both libraries into the package; returns whether they are there."""
    mode = os.environ.get("GRADKERN_NATIVE", "auto")
    if mode == "0":
        print("gradkern: native library not wanted (GRADKERN_NATIVE=0); pure Python install")
        return False
    reasons = reasons_against()
    if reasons and mode != "1":
        print(f"gradkern: pure Python install, because {'; '.join(reasons)}")
        return False
    if reasons:
        raise SystemExit(f"gradkern: GRADKERN_NATIVE=1 but {'; '.join(reasons)}")
    build = ROOT / "build" / "native"
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(ninja_file(build, ROOT / "gradkern"))
    subprocess.run(["ninja", "-C", str(build)], check=True)
    return True


class BuildPy(build_py):
    """Build the native library before collecting package data."""

    def run(self) -> None:
        build_native()
        super().run()


class EditableWheel(editable_wheel):
    """Build the native library for editable installs as well."""

    def run(self) -> None:
        build_native()
        super().run()


class BdistWheel(bdist_wheel):
    """One wheel per platform for every Python: the libraries do not use the Python API."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not any((ROOT / "gradkern").glob("*.so"))

    def get_tag(self) -> tuple[str, str, str]:
        _, _, plat = super().get_tag()
        return "py3", "none", "any" if self.root_is_pure else plat


class NativeDistribution(Distribution):
    """Lets the wheel carry a platform tag although setuptools knows of no extension module."""

    def has_ext_modules(self) -> bool:
        return any((ROOT / "gradkern").glob("*.so"))


setup(
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel, "bdist_wheel": BdistWheel},
)
