"""What a power cut may leave: system calls, recorded by ``trace_writes.c``, replayed on a pessimistic disk."""

from __future__ import annotations

import os
import posixpath
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

SECTOR = 512

Content = TypeVar("Content")

# What there is below a folder: bytes of files and None for folders, by relative path.
Image: TypeAlias = "dict[str, bytes | None]"


@dataclass(frozen=True, slots=True)
class Operation:
    """One system call that succeeded, a sync that was made to fail, or a mark that the process made.

    Attributes:
        name: ``open``, ``close``, ``write``, ``truncate``, ``sync``, ``rename``, ``remove``, ``mkdir``, ``fail`` or
            ``mark``.
        path: Relative to the traced folder. For calls on a descriptor what it was opened as; for a mark its text.
        descriptor: -1 for calls on paths.
        number: Flags of an open, offset of a write, length of a truncate.
        new_path: Of a rename.
        data: Of a write.
    """

    name: str
    path: str
    descriptor: int = -1
    number: int = 0
    new_path: str = ""
    data: bytes = b""


def read_trace(trace: Path) -> list[Operation]:
    operations = []
    opened: dict[str, str] = {}
    with trace.open("rb") as stream:
        while line := stream.readline():
            name, descriptor, number, size, path, new_path = line.decode().removesuffix("\n").split("\t")
            if name == "open":
                opened[descriptor] = path
            elif descriptor != "-1":
                path = opened[descriptor]
            data = stream.read(int(size))
            operations.append(Operation(name, path, int(descriptor), int(number), new_path, data))
    return operations


def below(trace: list[Operation], folder: str) -> list[Operation]:
    """The part of a trace that went on in one folder, as if that had been traced; of marks too, by their text."""

    def inside(path: str) -> str:
        return path.removeprefix(folder).removeprefix("/")

    return [
        replace(operation, path=inside(operation.path), new_path=inside(operation.new_path))
        for operation in trace
        if operation.path == folder or operation.path.startswith(f"{folder}/")
    ]


class Node(Generic[Content]):
    """A file (bytes) or a folder (nodes by name): what is safe, then everything it has held since, oldest first."""

    def __init__(self, content: Content) -> None:
        self.versions = [content]

    def change(self, content: Content) -> None:
        self.versions.append(content)

    def sync(self) -> None:
        del self.versions[:-1]


@dataclass(frozen=True, slots=True)
class PowerCut:
    """What of the versions since the last sync is found afterwards.

    Attributes:
        names: Chooses for a folder.
        data: Chooses for a file.
    """

    names: Callable[[Sequence[dict[str, Node[Any]]]], dict[str, Node[Any]]]
    data: Callable[[Sequence[bytes]], bytes]


class Disk:
    """A folder on a file system that keeps only what POSIX says it must.

    The bytes of a file are safe once the file has been synced, by whichever name; the names in a folder once the folder
    has been. Everything since may be found or not, of each file and of each folder for itself.
    """

    def __init__(self) -> None:
        self._root: Node[Any] = Node({})
        self._open: dict[int, Node[Any]] = {}

    def apply(self, operation: Operation) -> None:
        """Do what a recorded call did."""
        match operation:
            case Operation(name="open", descriptor=descriptor, path=path, number=flags):
                self._open[descriptor] = self._opened(path, flags)
            case Operation(name="close", descriptor=descriptor):
                del self._open[descriptor]
            case Operation(name="write", descriptor=descriptor, number=offset, data=data):
                file = self._open[descriptor]
                old = file.versions[-1]
                file.change(_piece(old, 0, offset) + data + old[offset + len(data) :])
            case Operation(name="truncate", descriptor=descriptor, number=length):
                file = self._open[descriptor]
                file.change(_piece(file.versions[-1], 0, length))
            case Operation(name="sync", descriptor=descriptor):
                self._open[descriptor].sync()
            case Operation(name="mkdir", path=path):
                self._enter(path, Node({}))
            case Operation(name="rename", path=path, new_path=new_path):
                self._enter(new_path, self._remove(path))
            case Operation(name="remove", path=path):
                self._remove(path)
            case Operation(name="fail" | "mark"):
                pass
            case _:
                raise ValueError(f"unknown operation {operation.name!r}")

    def after(self, cut: PowerCut) -> Image:
        """What is found if the power goes now."""
        return dict(_walk("", self._root, cut))

    def _opened(self, path: str, flags: int) -> Node[Any]:
        node = self._find(path)
        if node is None:
            if not flags & os.O_CREAT:
                raise ValueError(f"{path!r} was opened but never created; the trace has a hole")
            node = Node(b"")
            self._enter(path, node)
        elif flags & os.O_TRUNC:
            node.change(b"")
        return node

    def _find(self, path: str) -> Node[Any] | None:
        node = self._root
        for name in filter(None, path.split("/")):
            if name not in node.versions[-1]:
                return None
            node = node.versions[-1][name]
        return node

    def _parent(self, path: str) -> Node[Any]:
        parent = self._find(posixpath.dirname(path))
        if parent is None:
            raise ValueError(f"{path!r} is in no known folder; the trace has a hole")
        return parent

    def _enter(self, path: str, node: Node[Any]) -> None:
        parent = self._parent(path)
        parent.change({**parent.versions[-1], posixpath.basename(path): node})

    def _remove(self, path: str) -> Node[Any]:
        parent = self._parent(path)
        names = dict(parent.versions[-1])
        node = names.pop(posixpath.basename(path))
        parent.change(names)
        return node


def _walk(path: str, node: Node[Any], cut: PowerCut) -> Iterator[tuple[str, bytes | None]]:
    if isinstance(node.versions[-1], bytes):
        yield path, node.versions[0] if len(node.versions) == 1 else cut.data(node.versions)
        return
    if path:
        yield path, None
    names = node.versions[0] if len(node.versions) == 1 else cut.names(node.versions)
    for name, child in names.items():
        yield from _walk(f"{path}/{name}" if path else name, child, cut)


def _piece(content: bytes, start: int, end: int) -> bytes:
    """Bytes of a file, zeros where it has none."""
    return content[start:end].ljust(end - start, b"\0")


def _oldest(versions: Sequence[Content]) -> Content:
    return versions[0]


def _newest(versions: Sequence[Content]) -> Content:
    return versions[-1]


def _resized(versions: Sequence[bytes]) -> bytes:
    """The size got to the disk, the data did not: what is new reads as zeros."""
    return _piece(versions[0], 0, len(versions[-1]))


# What may be lost, by how it is lost. All that is not synced goes in the first, which is what POSIX allows at worst.
CUTS = {
    "all is lost": PowerCut(_oldest, _oldest),
    "nothing is lost": PowerCut(_newest, _newest),
    "data is lost": PowerCut(_newest, _oldest),
    "data is lost, sizes are not": PowerCut(_newest, _resized),
    "names are lost": PowerCut(_oldest, _newest),
}


def torn(generator: random.Random) -> PowerCut:
    """Every file and folder is found as of some moment, the file's next write done up to some byte."""

    def data(versions: Sequence[bytes]) -> bytes:
        moment = generator.randrange(len(versions) - 1)
        before, after = versions[moment : moment + 2]
        most = max(len(before), len(after))
        tear = generator.randint(0, most)
        return (_piece(after, 0, tear) + _piece(before, tear, most))[: generator.choice((len(before), len(after)))]

    return PowerCut(generator.choice, data)


def scattered(generator: random.Random) -> PowerCut:
    """Every name of a folder and every sector of a file is found as of a moment of its own, and so is a file's size."""

    def names(versions: Sequence[dict[str, Node[Any]]]) -> dict[str, Node[Any]]:
        found = {}
        for name in sorted(set().union(*versions)):
            node = generator.choice(versions).get(name)
            if node is not None:
                found[name] = node
        return found

    def data(versions: Sequence[bytes]) -> bytes:
        size = len(generator.choice(versions))
        sectors = (_piece(generator.choice(versions), at, at + SECTOR) for at in range(0, size, SECTOR))
        return b"".join(sectors)[:size]

    return PowerCut(names, data)


def write_image(image: Image, folder: Path) -> None:
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def read_image(folder: Path) -> Image:
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}
