"""A ledger that several ranks recorded: a folder with one shard for each, read as one.

A shard is the ledger of one rank's samples. Its gradient multipliers have the mean over ranks in them, so that what all
visits of a step did to the parameters, in all shards, is what the step did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._store import Closing, StoreReader, holds_catalog

__all__ = ["ShardsReader", "open_store", "recorded_ranks", "require_ranks", "shard_facts", "shard_path"]


def shard_path(path: Path, rank: int) -> Path:
    """The folder of a rank's shard."""
    return path / f"rank-{rank:05d}"


def shard_facts(rank: int, ranks: int) -> dict[str, str]:
    """What the catalog of a shard has beside that of a ledger."""
    return {"shard": str(rank), "shards": str(ranks)}


def recorded_ranks(path: Path, rank: int) -> int | None:
    """How many ranks recorded a ledger, by the shard of one of them, 1 for one process; None if neither is there."""
    if shard_path(path, rank).is_dir():
        return int(StoreReader(shard_path(path, rank)).facts.get("shards", 1))
    return 1 if holds_catalog(path) else None


def require_ranks(path: Path, found: int | None, ranks: int) -> None:
    """Raise ``LedgerError`` where a ledger was recorded by another number of ranks than are to go on with it."""
    if found is not None and found != ranks:
        raise LedgerError(
            f"record: the ledger {str(path)!r} was recorded by {found} {'process' if found == 1 else 'processes'}, and "
            f"{ranks} would go on with it; a rank goes on with its own samples alone: use as many as then, or record "
            f"into a new folder"
        )


def open_store(path: Path) -> StoreReader:
    """Read a ledger's folder, recorded by one process or by several.

    Raises:
        LedgerError: As :class:`~gradkern.rollback._store.StoreReader`; or shards are missing, do not belong together,
            or ``path`` is a single one of them.
    """
    if not shard_path(path, 0).is_dir():
        store = StoreReader(path)
        if "shard" in store.facts:
            raise LedgerError(
                f"{str(path)!r} holds what rank {store.facts['shard']} of {store.facts['shards']} recorded, and a step "
                f"is of all ranks; open the folder that was given to record(): {str(path.absolute().parent)!r}"
            )
        return store
    first = StoreReader(shard_path(path, 0))
    folders = [shard_path(path, rank) for rank in range(int(first.facts.get("shards", 1)))]
    for rank, folder in enumerate(folders):
        if not folder.is_dir():
            raise LedgerError(
                f"the ledger {str(path)!r} lacks {folder.name}, the shard of rank {rank} of {len(folders)}; copy the "
                f"shards of all ranks into one folder"
            )
    return ShardsReader(path, [first, *map(StoreReader, folders[1:])])


class ShardsReader(StoreReader):
    """Reads the shards of all ranks as one ledger, which has the steps that all of them have.

    Args:
        path: The folder of the shards.
        shards: Of all ranks, in order.

    Attributes:
        files: Of all shards, rank by rank.
        facts: As the shards have them in common.

    Raises:
        LedgerError: They are not of one recording.
    """

    def __init__(self, path: Path, shards: Sequence[StoreReader]) -> None:
        _require_one_recording(path, shards)
        self.path = path
        self._shards = tuple(shards)
        self.files = tuple(
            replace(entry, name=f"{shard.path.name}/{entry.name}") for shard in shards for entry in shard.files
        )
        self.facts = {key: value for key, value in shards[0].facts.items() if key != "shard"}
        self.layout = shards[0].layout

    @property
    def parts(self) -> Sequence[StoreReader]:
        """See :attr:`StoreReader.parts`."""
        return self._shards

    @property
    def steps(self) -> int:
        """Number of steps that every rank has committed."""
        return min(shard.steps for shard in self._shards)

    @property
    def visits(self) -> int:
        """Number of visits of these steps."""
        return sum(_visits_before(shard, self.steps) for shard in self._shards)

    @property
    def closing(self) -> Closing | None:
        """Of all ranks together; None unless recording ended properly in all of them, after the same step."""
        closings = [shard.closing for shard in self._shards if shard.steps == self.steps]
        known = [closing for closing in closings if closing is not None]
        if len(known) < len(self._shards):
            return None
        roundings = tuple(sum(each) for each in zip(*(closing.roundings for closing in known), strict=True))
        return replace(known[0], roundings=roundings)

    def load_role(self, role: str) -> dict[str, torch.Tensor]:
        """See :meth:`StoreReader.load_role`; ``"deltas"`` are those of all ranks added up rank by rank, in fp64."""
        if role != "deltas":
            return self._shards[0].load_role(role)
        sums: dict[str, torch.Tensor] = {}
        for shard in self._shards:
            for name, delta in shard.load_role(role).items():
                sums[name] = sums[name] + delta if name in sums else delta.double()
        return sums


def _visits_before(shard: StoreReader, step: int) -> int:
    visits = 0
    for entry in shard.segments:
        if entry.end_step <= step:
            visits += entry.visits
        elif entry.first_step < step:
            visits += int(shard.load(entry)["visit/bounds"][step - entry.first_step])
    return visits


def _require_one_recording(path: Path, shards: Sequence[StoreReader]) -> None:
    for rank, shard in enumerate(shards):
        expected = {**shard_facts(rank, len(shards)), "ledger_id": shards[0].facts.get("ledger_id")}
        got = {key: shard.facts.get(key) for key in expected}
        if got != expected:
            raise LedgerError(
                f"{str(shard.path)!r} is not the shard of rank {rank} that belongs to the others: it says {got}, "
                f"expected {expected}; restore the shards of one recording from a copy"
            )
        for what, mine, first in (
            ("of other parameters", shard.layout, shards[0].layout),
            ("from another start", _initial(shard), _initial(shards[0])),
        ):
            if mine != first:
                raise LedgerError(
                    f"rank {rank} recorded {what} than rank 0 in the ledger {str(path)!r}; wrap the model in "
                    f"DistributedDataParallel in all ranks, then record again"
                )
    ends = {(shard.steps, shard.closing.parameter_digest) for shard in shards if shard.closing is not None}
    if len(ends) > len({steps for steps, _ in ends}):
        raise LedgerError(
            f"the ranks of the ledger {str(path)!r} ended with different parameters after as many steps, so that "
            f"influence on them is not defined: gradients were changed in some ranks only, or never averaged "
            f"(no_sync() around the last backward of a step); record again"
        )


def _initial(shard: StoreReader) -> str:
    (checksum,) = (entry.sha256 for entry in shard.files if entry.role == "initial")
    return checksum
