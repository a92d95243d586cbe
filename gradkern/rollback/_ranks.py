"""The processes of a DistributedDataParallel run that record together, each the gradients of its own samples.

DDP steps with the mean over ranks of what their backward passes gave. Everything that recording follows is linear in
gradients given the preconditioner, which is the same in all ranks, so each rank follows its own samples alone, with a
gradient multiplier divided by the number of ranks. What all ranks have together obeys the same laws as one recording.
Ranks talk to one another when recording begins, and where what was captured is compared with the gradient of a step.
"""

from __future__ import annotations

import gc
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._shards import recorded_ranks, require_ranks, shard_facts, shard_path
from gradkern.rollback._store import StoreWriter

__all__ = ["Ranks", "find_ranks", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``DistributedDataParallel`` wraps; ``model`` itself if it is none."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def find_ranks(model: nn.Module, trained: Sequence[Tensor]) -> Ranks | None:
    """The processes that average the gradients of ``model``; None if there is but one, or no such averaging.

    Args:
        model: Wrapped, or what is wrapped.
        trained: The optimizer's parameters.

    Raises:
        ValueError: ``DistributedDataParallel`` averages the gradients of some trained parameters and not of others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    named = {name: parameter for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad}
    meant = {id(parameter) for parameter in trained}
    ours = {id(parameter): name for name, parameter in named.items() if id(parameter) in meant}
    # A model does not know by what it is wrapped.
    for ddp in [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]:
        averaged = {
            id(parameter)
            for name, parameter in ddp.module.named_parameters()
            if name not in ddp.parameters_to_ignore and id(parameter) in ours
        }
        if not averaged or dist.get_world_size(ddp.process_group) <= 1:
            continue
        if len(averaged) < len(ours):
            others = [name for key, name in ours.items() if key not in averaged]
            raise ValueError(
                f"record: DistributedDataParallel averages the gradients of some trained parameters and not of "
                f"{others[:8]!r}, expected all or none; wrap the whole model, or train the others by another optimizer"
            )
        return Ranks(ddp)
    return None


class Ranks:
    """This process among those that record together; made by :func:`find_ranks`.

    Attributes:
        index: Its rank in their group, from 0.
        count: Number of ranks.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        self._group: Any = ddp.process_group
        self.index = dist.get_rank(self._group)
        self.count = dist.get_world_size(self._group)

    def require_even(self) -> None:
        """Raise where DDP lets a rank go on without the others, whose samples would then be in steps of no shard."""
        config = getattr(self._ddp, "_join_config", None)
        if config is not None and config.enable:
            raise LedgerError(
                "recorder.batch: training runs in DistributedDataParallel.join(), where a rank that has run out of "
                "data makes no steps any more; give all ranks the same number of micro-batches, as a "
                "DistributedSampler does, or leave join()"
            )

    def open_shard(
        self, path: Path, layout: Layout, begun: Mapping[str, object], open_part: Callable[..., StoreWriter]
    ) -> StoreWriter:
        """Open the shards of all ranks, or of none.

        Args:
            path: The ledger's folder.
            layout: What this rank records.
            begun: What else must be the same in all ranks, with ``ledger_id``: that of the ledger to go on with, None
                for a new one.
            open_part: Called with the folder of this rank's shard, ``facts=`` for its catalog and ``ledger_id=``, opens
                it.

        Raises:
            LedgerError: ``path`` exists and is to be new, or ranks differ: in all of them, and nothing has been changed
                then; or another rank could not open its shard.
            Exception: This one could not.
        """
        is_new = begun["ledger_id"] is None
        ledger_id = self._agree(path, layout, begun, is_new=is_new)
        facts, store, failed = shard_facts(self.index, self.count), None, None
        try:
            store = open_part(shard_path(path, self.index), facts=facts, ledger_id=ledger_id)
        except Exception as error:  # the others wait to hear of it
            failed = error
        everyone = self._gathered(None if failed is None else str(failed))
        if any(told is not None for told in everyone):
            if store is not None:
                store.close()
            if is_new:
                # Of the folder only what is this rank's; the last one finds it empty.
                if store is not None:
                    shutil.rmtree(shard_path(path, self.index), ignore_errors=True)
                with suppress(OSError):
                    path.rmdir()
        for rank, told in enumerate(everyone):
            if failed is None and told is not None:
                raise LedgerError(f"record: rank {rank} could not open its shard of the ledger: {told}")
        if store is None:
            raise cast(Exception, failed)
        return store

    def _agree(self, path: Path, layout: Layout, begun: Mapping[str, object], *, is_new: bool) -> str:
        """A new name for a ledger, the same in all ranks, once they are known to begin the same."""
        is_there: bool | int | str | None = is_new and path.exists()
        if not is_new:
            try:
                is_there = recorded_ranks(path, self.index)
            except LedgerError as error:  # the others wait to hear of it
                is_there = str(error)
        everyone = self._gathered((is_there, layout.to_json(), dict(begun), uuid.uuid4().hex))
        _, text, said, name = everyone[0]
        for rank, (found, their_text, their_said, _) in enumerate(everyone):
            if isinstance(found, str):
                raise LedgerError(f"record: rank {rank} cannot go on with its shard of the ledger: {found}")
            if not is_new:
                require_ranks(path, found, self.count)
            elif found:
                raise LedgerError(
                    f"record: {str(path)!r} exists for rank {rank}, expected a new folder; a ledger is never "
                    f"overwritten: choose another path or remove it first, or go on with it: resume=, in every rank "
                    f"the state_dict() of its recorder"
                )
            if their_text != text:
                raise LedgerError(
                    f"record: rank {rank} trains or records other parameters than rank 0; give record() the same "
                    f"model, optimizer and arguments in all ranks"
                )
            if their_said != said:
                raise LedgerError(
                    f"record: rank {rank} begins with {their_said}, rank 0 with {said}, expected the same; give "
                    f"record() the same arguments in all ranks, and as resume= in each the state_dict() that its "
                    f"recorder gave after the same step"
                )
        return str(name)

    def missing(
        self, gradients: Mapping[int, Tensor], waiting: Callable[[int], Tensor | None], parameters: int
    ) -> list[tuple[int, float, float]]:
        """How far the optimizer's gradients are from the mean of what all ranks captured, by a random projection.

        Every rank must call this at the same step. One number of each parameter is exchanged.

        Args:
            gradients: By parameter, the same in all ranks.
            waiting: What this rank captured; None for nothing.
            parameters: Number of all parameters.

        Returns:
            Index, norm of the difference as the projection estimates it, norm; without those that are not finite, which
            the rank refuses whose they are.
        """
        device = next(iter(gradients.values())).device
        sums = torch.zeros(parameters, dtype=torch.float64, device=device)
        for index in gradients:
            captured = waiting(index)
            if captured is not None:
                sums[index] = _project(captured, index)
        dist.all_reduce(sums, group=self._group)
        rows = []
        for index, gradient in gradients.items():
            difference = (sums[index] / self.count - _project(gradient, index)).abs()
            rows.append(torch.stack([difference, torch.linalg.vector_norm(gradient, dtype=torch.float64)]))
        found = zip(gradients, torch.stack(rows).tolist(), strict=True)
        return [(index, difference, norm) for index, (difference, norm) in found if difference - difference == 0.0]

    def _gathered(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _project(tensor: Tensor, seed: int) -> Tensor:
    """``⟨u wᵀ, tensor⟩`` with a random ``u wᵀ`` of its shape: of mean 0, and of its norm's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    matrix = tensor.detach().float().reshape(len(tensor), -1)
    u, w = (torch.randn(size, generator=generator).to(matrix.device) for size in matrix.shape)
    if matrix.shape[1] == 1:
        w = torch.ones_like(w)
    return u.double() @ (matrix @ w).double()
