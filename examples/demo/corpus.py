"""Real text that every machine has: the source files of Python's own standard library, as bytes.

The training files are cut into rows of equal length; a row's number is its sample id, and every id leads back
to a file and a line. Whole files are held out, so that no row of theirs is ever trained on.
"""

from __future__ import annotations

import sysconfig
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Corpus", "Snippet", "readable"]

# Tests, tables of numbers, and what distributions split off or add: the rest is much the same everywhere.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo"}
_LEFT_OUT |= {"encodings", "pydoc_data", "site-packages", "dist-packages"}
_HOLD_OUT_EVERY = 20


@dataclass(frozen=True)
class Snippet:
    """A piece of a source file.

    Attributes:
        path: File, relative to the corpus root.
        first_line: Line on which the piece begins, counted from 1.
        data: The piece itself.
    """

    path: str
    first_line: int
    data: bytes

    @property
    def text(self) -> str:
        """The piece as :func:`readable` text."""
        return readable(self.data)


class Corpus:
    """Byte-level rows of a source tree, and the files held out of them.

    Args:
        length: Bytes in a row.
        root: Folder with ``*.py`` files; the running Python's standard library by default.

    Raises:
        ValueError: If ``root`` holds too little text for one training row and one held-out file.
    """

    def __init__(self, length: int, root: Path | None = None) -> None:
        self.length = length
        self.root = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
        self._paths: list[str] = []
        self._contents: list[bytes] = []
        self._first_row: list[int] = []
        self._held_out: dict[str, bytes] = {}
        row_count = 0
        for index, path in enumerate(_source_files(self.root)):
            content = path.read_bytes()
            name = path.relative_to(self.root).as_posix()
            if index % _HOLD_OUT_EVERY == 0:
                self._held_out[name] = content
            elif len(content) >= length:
                self._paths.append(name)
                self._contents.append(content)
                self._first_row.append(row_count)
                row_count += len(content) // length
        if row_count == 0 or not self._held_out:
            raise ValueError(
                f"Corpus: {self.root} has {row_count} rows of {length} bytes and {len(self._held_out)} "
                "held-out files, expected at least one of each; pass a folder with more Python sources"
            )
        self._row_count = row_count

    def __len__(self) -> int:
        """Number of training rows; sample ids are ``0 .. len - 1``."""
        return self._row_count

    @property
    def file_count(self) -> int:
        """Number of files that training rows are cut from."""
        return len(self._paths)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows by sample id: int64 tensor of byte values, shape ``(len(ids), length)``."""
        return torch.stack([_as_tensor(self._row(int(sample_id))) for sample_id in ids])

    def snippet(self, sample_id: int) -> Snippet:
        """Say where a training row comes from."""
        file_index, offset = self._locate(sample_id)
        content = self._contents[file_index]
        return Snippet(
            path=self._paths[file_index],
            first_line=content.count(b"\n", 0, offset) + 1,
            data=content[offset : offset + self.length],
        )

    def held_out_rows(self, count: int) -> torch.Tensor:
        """Return the first ``count`` rows of the held-out files, shape ``(count, length)`` or fewer rows."""
        rows = [
            _as_tensor(content[start : start + self.length])
            for content in self._held_out.values()
            for start in range(0, len(content) - self.length + 1, self.length)
        ]
        return torch.stack(rows[:count])

    def held_out_prompt(self, marker: str, length: int) -> Snippet:
        """Return ``length`` bytes of a held-out file that end with ``marker``, the first such place.

        Raises:
            ValueError: If no held-out file has the marker far enough from its start.
        """
        needle = marker.encode()
        for name, content in self._held_out.items():
            position = content.find(needle, max(0, length - len(needle)))
            if position >= 0:
                end = position + len(needle)
                start = end - length
                return Snippet(name, content.count(b"\n", 0, start) + 1, content[start:end])
        raise ValueError(
            f"held_out_prompt: no held-out file of {self.root} has {marker!r} after {length} bytes; "
            "pass a more common marker or a smaller length"
        )

    def _row(self, sample_id: int) -> bytes:
        file_index, offset = self._locate(sample_id)
        return self._contents[file_index][offset : offset + self.length]

    def _locate(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self._row_count:
            raise IndexError(f"Corpus: sample id {sample_id} is outside 0 .. {self._row_count - 1}")
        file_index = bisect_right(self._first_row, sample_id) - 1
        return file_index, (sample_id - self._first_row[file_index]) * self.length


def readable(data: bytes) -> str:
    """Turn bytes into text that is safe to print; what is no character, or a control character, is U+FFFD."""
    text = data.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path


def _as_tensor(data: bytes) -> torch.Tensor:
    # bytearray: torch warns when it is handed memory that it may not write.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
