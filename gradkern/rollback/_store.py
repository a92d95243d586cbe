"""The ledger on disk: immutable tensor files and a SQLite catalog whose transactions are the commit points.

A file is written under a temporary name, synced, renamed, and its folder synced, before the catalog's
transaction names it together with its checksum. Whatever the catalog names is therefore complete on disk, and
whatever it does not name was never committed. Segments are read whole and checked before a single tensor is used.

One writer at a time holds a lock, which ends with its process. Going back takes the segments after a step out of the
catalog first and removes their files afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._tensor_file import load_tensors, safetensors_torch, sync_folder, write_tensors

__all__ = ["Closing", "FileEntry", "StoreReader", "StoreWriter"]

FORMAT_VERSION = 1
# Of one rank's shard, which readers that know of no shards would take for a whole ledger.
_SHARD_FORMAT_VERSION = 2
# With a budget of bytes, whose records lie otherwise.
_PACKED_FORMAT_VERSION = 3

_CATALOG = "catalog.sqlite"
_SEGMENT_FOLDER = "segments"
_LOCK = "writer.lock"
_OWN_NAMES = re.compile(r"(segments/\d{6,}|state-\d{6,}|deltas|initial)\.(safetensors|partial)")
_FILES = """CREATE TABLE files (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('initial', 'segment', 'deltas', 'state')),
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    first_step INTEGER NOT NULL,
    end_step INTEGER NOT NULL,
    visits INTEGER NOT NULL
)"""
_SCHEMA = ("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)", _FILES)
# Of a ledger begun before there were states.
_NEW_SCHEMA = (
    "ALTER TABLE files RENAME TO older",
    _FILES,
    "INSERT INTO files SELECT name, role, sha256, bytes, first_step, end_step, visits FROM older",
    "DROP TABLE older",
)
_INSERT_FILE = "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)"

# Of all facts those that commit_closing adds.
_CLOSING_FACTS = ("decays", "roundings", "parameter_digest")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One committed file.

    Attributes:
        name: Path inside the ledger's folder.
        role: ``"initial"`` (``theta_0``), ``"segment"``, ``"deltas"`` (``D`` at close) or ``"state"`` (to go back to).
        sha256: Of the file's bytes.
        bytes: The file's size.
        first_step: First optimizer step it covers, from 0.
        end_step: One past the last; of a state, which covers none, the steps before it.
        visits: Number of visits in it.
    """

    name: str
    role: str
    sha256: str
    bytes: int
    first_step: int
    end_step: int
    visits: int


@dataclass(frozen=True, slots=True)
class Closing:
    """What is known only once recording has ended.

    Attributes:
        decays: Product of all decays of each trained parameter.
        roundings: Of each, what rounding its gradients can have added to the sums; 0 where that is not followed.
        parameter_digest: Digest of the trained parameters, see
            :func:`~gradkern.rollback._layout.digest_parameters`.
    """

    decays: tuple[float, ...]
    roundings: tuple[float, ...]
    parameter_digest: str


class StoreWriter:
    """Commits files to a ledger's folder; made by :meth:`create` or :meth:`resume`.

    Attributes:
        path: The ledger's folder.
        ledger_id: Tells this ledger from all others; None in one written before there were such.
        steps: Committed so far.
    """

    def __init__(self, path: Path, lock: sqlite3.Connection, ledger_id: str | None) -> None:
        self.path = path
        self._lock = lock
        self.ledger_id = ledger_id
        self.steps = 0
        self._attempts = 0
        self._catalog = sqlite3.connect(path / _CATALOG, isolation_level=None, check_same_thread=False)
        # EXTRA is FULL plus a sync of the folder when the journal goes: commits survive power loss.
        self._catalog.execute("PRAGMA synchronous = EXTRA")

    @classmethod
    def create(
        cls,
        path: Path,
        layout: Layout,
        initial: Mapping[str, torch.Tensor],
        settings: Mapping[str, str],
        ledger_id: str | None = None,
    ) -> StoreWriter:
        """Create a ledger.

        Args:
            path: Folder to create, with its parents.
            layout: What will be recorded.
            initial: ``theta_0`` by name.
            settings: Further facts to keep, as strings.
            ledger_id: See there; None for a new one.

        Raises:
            LedgerError: ``path`` exists.
            ImportError: safetensors is not installed.
        """
        safetensors_torch()
        try:
            created = _make_folder(path)
        except FileExistsError:
            raise LedgerError(
                f"record: {str(path)!r} exists, expected a new folder; a ledger is never overwritten: choose "
                f"another path or remove it first, or go on with it: resume=, the state_dict() of its recorder"
            ) from None
        # Only now is the folder ours to remove again: another process may have been the one to create it.
        try:
            (path / _SEGMENT_FOLDER).mkdir()
            store = cls(path, _take_lock(path), ledger_id or uuid.uuid4().hex)
            try:
                entry = store._write("initial.safetensors", "initial", initial)
                for folder in created:
                    sync_folder(folder.parent)
                facts = {
                    **settings,
                    "format_version": str(_version(settings)),
                    "ledger_id": str(store.ledger_id),
                    "layout": layout.to_json(),
                }
                store._commit(entry, facts, _SCHEMA)
            except BaseException:
                store.close()
                raise
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return store

    @classmethod
    def open(cls, path: Path) -> tuple[StoreWriter, StoreReader]:
        """Open a ledger to change it.

        Returns:
            The writer, and what it holds.

        Raises:
            LedgerError: There is no ledger, it is damaged, or something records into it.
        """
        StoreReader(path)  # raises where there is none
        lock = _take_lock(path)
        try:
            found = StoreReader(path)
            store = cls(path, lock, found.facts.get("ledger_id"))
        except BaseException:
            lock.close()
            raise
        store.steps = found.steps
        store._attempts = 1 + max((int(Path(entry.name).stem) for entry in found.segments), default=-1)
        return store, found

    @classmethod
    def resume(
        cls, path: Path, layout: Layout, settings: Mapping[str, str], ledger_id: str | None, steps: int
    ) -> StoreWriter:
        """Open a ledger to go on after ``steps`` steps; what it holds of later ones is for :meth:`truncate`.

        Raises:
            LedgerError: There is no such ledger, it is another one, of another layout or rank, damaged, or being
                written; or it has fewer steps.
        """
        store, found = cls.open(path)
        try:
            _require_same(found, layout, settings, ledger_id, steps)
        except BaseException:
            store.close()
            raise
        return store

    def truncate(self, steps: int, head: tuple[FileEntry, Mapping[str, torch.Tensor], int] | None) -> None:
        """Take out whatever is after ``steps`` steps, and what was known of the end, in one transaction.

        Args:
            steps: To keep.
            head: Of the segment that goes on past them, if there is one: its entry, the tensors of its part before, and
                the visits in that.
        """
        kept = []
        if head is not None:
            entry, tensors, visits = head
            kept = [self._write(self._new_name(), "segment", tensors, entry.first_step, steps, visits)]
        self._transact(
            [
                ("DELETE FROM files WHERE role IN ('deltas', 'state') OR (role = 'segment' AND end_step > ?)", [steps]),
                *((_INSERT_FILE, astuple(entry)) for entry in kept),
                *(("DELETE FROM meta WHERE key = ?", [key]) for key in _CLOSING_FACTS),
            ]
        )
        self.steps = steps
        self.remove_leftovers()

    def replace(self, entries: Sequence[FileEntry], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put one segment in the place of some consecutive ones."""
        name = self._new_name()
        first_step, visits = entries[0].first_step, sum(entry.visits for entry in entries)
        joined = self._write(name, "segment", tensors, first_step, entries[-1].end_step, visits)
        self._transact(
            [
                *(("DELETE FROM files WHERE name = ?", [entry.name]) for entry in entries),
                (_INSERT_FILE, astuple(joined)),
            ]
        )

    def remove_leftovers(self) -> None:
        """Delete the files that a writer made and the catalog does not name; files of others stay."""
        named = {name for (name,) in self._catalog.execute("SELECT name FROM files")}
        for file in [*self.path.iterdir(), *(self.path / _SEGMENT_FOLDER).iterdir()]:
            name = file.relative_to(self.path).as_posix()
            if _OWN_NAMES.fullmatch(name) and name not in named:
                file.unlink()

    def commit_segment(self, tensors: Mapping[str, torch.Tensor], steps: int, visits: int) -> None:
        """Make the records of the next ``steps`` steps durable; when this returns they survive any crash."""
        self._commit(self._write(self._new_name(), "segment", tensors, self.steps, self.steps + steps, visits), {})
        self.steps += steps

    def committed_steps(self) -> int:
        """Steps that the catalog names, also where the call that committed them was interrupted."""
        (end,) = self._catalog.execute("SELECT MAX(end_step) FROM files").fetchone()
        self.steps = int(end)
        return self.steps

    def commit_state(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a state to go back to; where an interrupted call already did, nothing."""
        name = f"state-{step:06d}.safetensors"
        if self._catalog.execute("SELECT 1 FROM files WHERE name = ?", [name]).fetchone():
            return
        (schema,) = self._catalog.execute("SELECT sql FROM sqlite_master WHERE name = 'files'").fetchone()
        self._commit(self._write(name, "state", tensors, step, step), {}, () if "'state'" in schema else _NEW_SCHEMA)

    def commit_closing(self, deltas: Mapping[str, torch.Tensor], closing_facts: Closing) -> None:
        """Make the ledger complete; where an interrupted call already did, only wait for the disk."""
        if self._catalog.execute("SELECT 1 FROM files WHERE role = 'deltas'").fetchone():
            # A COMMIT whose last sync failed has taken effect, but a power cut could bring its journal back.
            sync_folder(self.path)
            return
        entry = self._write("deltas.safetensors", "deltas", deltas, self.steps, self.steps)
        values = (
            json.dumps(closing_facts.decays),
            json.dumps(closing_facts.roundings),
            closing_facts.parameter_digest,
        )
        self._commit(entry, dict(zip(_CLOSING_FACTS, values, strict=True)))

    def _new_name(self) -> str:
        # For every attempt another: a commit that took effect before it was interrupted owns its file for good.
        self._attempts += 1
        return f"{_SEGMENT_FOLDER}/{self._attempts - 1:06d}.safetensors"

    def close(self) -> None:
        """Close the catalog and let others write."""
        self._catalog.close()
        self._lock.close()

    def _write(
        self,
        name: str,
        role: str,
        tensors: Mapping[str, torch.Tensor],
        first_step: int = 0,
        end_step: int = 0,
        visits: int = 0,
    ) -> FileEntry:
        """Write a file and describe it."""
        content = write_tensors(self.path / name, tensors)
        checksum = hashlib.sha256(content).hexdigest()
        return FileEntry(name, role, checksum, len(content), first_step, end_step, visits)

    def _commit(self, entry: FileEntry, facts: Mapping[str, str], schema: Sequence[str] = ()) -> None:
        self._transact(
            [
                *((statement, ()) for statement in schema),
                (_INSERT_FILE, astuple(entry)),
                *(("INSERT INTO meta VALUES (?, ?)", fact) for fact in facts.items()),
            ]
        )

    def _transact(self, statements: Iterable[tuple[str, Sequence[object]]]) -> None:
        """All or nothing."""
        self._catalog.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in statements:
                self._catalog.execute(statement, values)
            self._catalog.execute("COMMIT")
        except BaseException:
            # Some failures, such as a full disk, end the transaction by themselves.
            if self._catalog.in_transaction:
                self._catalog.execute("ROLLBACK")
            raise


def holds_catalog(path: Path) -> bool:
    """Whether a folder is that of a ledger, or of a shard."""
    return (path / _CATALOG).is_file()


class StoreReader:
    """Reads a ledger's folder: whatever was committed, and nothing else.

    Args:
        path: A folder made by :class:`StoreWriter`.

    Attributes:
        path: The same.
        files: What is committed, in order of steps.
        facts: What is known of all of it.
        layout: How to read it.

    Raises:
        LedgerError: There is no ledger, its format is another, or its catalog is damaged. A damaged file is refused
            when it is read, so that the intact ones stay within reach.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        safetensors_torch()
        self.path = path
        catalog = path / _CATALOG
        if not holds_catalog(path):
            raise LedgerError(
                f"{str(path)!r} is no ledger: it has no {_CATALOG}; pass the folder that was given to record()"
            )
        try:
            # Not mode=ro: after a kill the first reader must be allowed to roll back the unfinished transaction.
            with closing(sqlite3.connect(f"{catalog.resolve().as_uri()}?mode=rw", uri=True)) as connection:
                self.facts: Mapping[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
                self._require_version()
                rows = connection.execute(
                    "SELECT name, role, sha256, bytes, first_step, end_step, visits FROM files "
                    "ORDER BY first_step, name"
                ).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(
                f"the catalog {str(catalog)!r} cannot be read ({error}); it is damaged, or recording was "
                f"killed before its first commit: restore it from a copy, or record again"
            ) from error
        self.files = tuple(FileEntry(*row) for row in rows)
        try:
            self.layout = Layout.from_json(self.facts["layout"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                f"the catalog {str(catalog)!r} is damaged: its layout does not parse ({error}); restore it from a copy"
            ) from error

    def _require_version(self) -> None:
        if self.facts.get("format_version") != str(_version(self.facts)):
            raise LedgerError(
                f"the ledger {str(self.path)!r} has format version {self.facts.get('format_version')}, this "
                f"gradkern reads version {_version(self.facts)}; read it with the version that wrote it"
            )

    @property
    def parts(self) -> Sequence[StoreReader]:
        """The stores that each record some of the samples of every step: this one alone, or the shards of all ranks."""
        return (self,)

    @property
    def segments(self) -> Sequence[FileEntry]:
        """The committed segments, in order of steps."""
        return [entry for entry in self.files if entry.role == "segment"]

    @property
    def steps(self) -> int:
        """Number of committed steps."""
        return max((entry.end_step for entry in self.segments), default=0)

    @property
    def visits(self) -> int:
        """Number of committed visits."""
        return sum(entry.visits for entry in self.segments)

    @property
    def closing(self) -> Closing | None:
        """What :meth:`StoreWriter.commit_closing` wrote; None when recording did not end properly."""
        if "parameter_digest" not in self.facts:
            return None
        decays = tuple(json.loads(self.facts["decays"]))
        # Ledgers written before they were followed lack them.
        roundings = tuple(json.loads(self.facts["roundings"])) if "roundings" in self.facts else (0.0,) * len(decays)
        return Closing(decays, roundings, self.facts["parameter_digest"])

    def load_role(self, role: str) -> dict[str, torch.Tensor]:
        """Load the one file of a role other than ``"segment"``."""
        (entry,) = (entry for entry in self.files if entry.role == role)
        return self.load(entry)

    def load(self, entry: FileEntry) -> dict[str, torch.Tensor]:
        """Load a file's tensors into memory.

        Raises:
            LedgerError: Any byte of the file differs from what was committed.
        """
        self.require_size(entry)
        content = (self.path / entry.name).read_bytes()
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise LedgerError(
                f"{str(self.path / entry.name)!r} is damaged: its checksum differs from the committed one; "
                f"restore the file from a copy"
            )
        return load_tensors(content)

    def tensor_bytes(self, entry: FileEntry) -> dict[str, int]:
        """Bytes of a file's tensors, from its header alone.

        Raises:
            LedgerError: The file is missing or of another size than committed, or its header does not parse.
        """
        self.require_size(entry)
        with (self.path / entry.name).open("rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                offsets = {name: found["data_offsets"] for name, found in header.items() if name != "__metadata__"}
            except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
                raise LedgerError(
                    f"{file.name!r} is damaged: its header does not parse ({error}); restore the file from a copy"
                ) from error
        return {name: end - start for name, (start, end) in offsets.items()}

    def require_size(self, entry: FileEntry) -> None:
        """Raise ``LedgerError`` for a file that is missing or of another size than committed."""
        file = self.path / entry.name
        if not file.is_file():
            raise LedgerError(f"{str(file)!r} is missing from the ledger; restore it from a copy")
        size = file.stat().st_size
        if size != entry.bytes:
            raise LedgerError(
                f"{str(file)!r} is damaged: it has {size} bytes, {entry.bytes} were committed; restore the "
                f"file from a copy"
            )


def _version(facts: Mapping[str, str]) -> int:
    if "bytes_per_visit" in facts:
        return _PACKED_FORMAT_VERSION
    return _SHARD_FORMAT_VERSION if "shard" in facts else FORMAT_VERSION


def _require_same(
    found: StoreReader, layout: Layout, settings: Mapping[str, str], ledger_id: str | None, steps: int
) -> None:
    """Raise for a ledger that cannot be gone on with after ``steps`` steps."""
    known = found.facts.get("ledger_id")
    if known is None or known != ledger_id:
        raise LedgerError(
            f"record: {str(found.path)!r} is another ledger ({known}) than the one that the state_dict() is of "
            f"({ledger_id}); pass the path of that one"
        )
    # What a replay runs on is one of all its steps.
    same = ["rank", "bytes_per_visit", "replayable", "shard", "shards"]
    same += ["threads", "torch"] * (settings["replayable"] == "1")
    if found.layout != layout or any(found.facts.get(key) != settings.get(key) for key in same):
        raise LedgerError(
            f"record: the ledger {str(found.path)!r} was recorded of another model or with another rank=, "
            f"bytes_per_visit=, unowned=, shared_inputs= or replayable=, or, to be replayed, with other threads or "
            f"another torch, or by another rank or other ranks; go on with what its first record() had"
        )
    for entry in found.files:
        found.require_size(entry)
    if steps > found.steps:
        raise LedgerError(
            f"record: the ledger {str(found.path)!r} cannot go on after step {steps}: it holds {found.steps} steps; "
            f"restore it from a copy, or record anew"
        )


def _take_lock(path: Path) -> sqlite3.Connection:
    """Be the one writer of a folder until the connection is closed or the process ends.

    Raises:
        LedgerError: There is one already.
    """
    # Of a file of its own, so that readers of the catalog are not kept out.
    lock = sqlite3.connect(path / _LOCK, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        lock.execute("PRAGMA journal_mode = OFF")  # nothing is ever written, a journal would only be left by a kill
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if "locked" not in str(error):
            raise
        raise LedgerError(
            f"something records into {str(path)!r} already, in this process or another; close that recorder first"
        ) from error
    return lock


def _make_folder(path: Path) -> list[Path]:
    """Create a folder with its parents; returns what was created, outermost first.

    Raises:
        FileExistsError: ``path`` exists.
    """
    missing = [parent for parent in reversed(path.absolute().parents) if not parent.exists()]
    for parent in missing:
        parent.mkdir(exist_ok=True)
    path.mkdir()
    return [*missing, path.absolute()]
