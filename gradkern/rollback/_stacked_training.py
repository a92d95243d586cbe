"""Many trainings at once: the recorded one, without other samples in each, with their parameters in one stack.

What "without" means is what :meth:`gradkern.rollback.Ledger.undo` means by it: the same order and random numbers, rows
dropped, and whatever the loss is of the rest. So no weights are put on rows of the whole batch, which only a mean over
samples would bear. Copies are put together instead whose batches, each fetched for the copy's own rows, have the same
shapes and left the random numbers in the same state: their losses are computed by one ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._replay import LoggedStep, Training
from gradkern.rollback._stacked_step import StackedOptimizer, UnstackableError
from gradkern.rollback._subtraction import StackedLosses

__all__ = ["StackedTraining", "bytes_of_copy"]


class StackedTraining:
    """Copies of a training that begins.

    Args:
        training: At its start; its model is run with other parameters and buffers, and keeps its own.
        ids: Of all samples, ascending, shape ``(samples,)``.
        left_out: Which samples each copy does without, bool, shape ``(copies, samples)``.

    Raises:
        UnstackableError: There is no stacked form of the optimizer's step.
    """

    def __init__(self, training: Training, ids: Tensor, left_out: Tensor) -> None:
        self._training = training
        self._ids, self._left_out = ids, left_out
        copies = len(left_out)
        self._optimizer = StackedOptimizer(training.optimizer, training.model, copies)
        named = dict(training.model.named_parameters())
        self._parameters = {
            name: _stack(named[name], copies) for name in self._optimizer.names if named[name].requires_grad
        }
        self._buffers = {name: _stack(each, copies) for name, each in training.model.named_buffers()}

    def make(self, step: LoggedStep) -> None:
        """Make a step, within :meth:`gradkern.rollback._replay.Replayer.as_recorded`.

        Raises:
            UnstackableError: The model or its loss cannot be computed for many sets of parameters at once.
        """
        self._training.set_options(step)
        gradients: dict[str, Tensor] = {}
        has_gradient: dict[str, Tensor] = {}
        for ids, state in zip(step.ids, step.log.states, strict=True):
            for group in self._groups(ids, state):
                for name, found in self._gradients(*group).items():
                    rows = group[0]
                    if name not in gradients:
                        gradients[name] = torch.zeros_like(self._parameters[name])
                        has_gradient[name] = torch.zeros(len(self._left_out), dtype=torch.bool)
                    gradients[name].index_add_(0, rows, found)
                    has_gradient[name][rows] = True
        self._optimizer.step(step.log.options["groups"], self._parameters, gradients, has_gradient)

    def losses(self, queries: Sequence[Batch], loss_fn: LossFn | None) -> Tensor:
        """The losses of queries as they are now, in eval mode: fp64, shape ``(copies, queries)``."""
        self._training.model.eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            stacked = {**self._parameters, **self._buffers}
            return torch.stack(
                [StackedLosses(self._training.model, query, loss_fn)(stacked) for query in queries], dim=1
            )

    def _groups(self, ids: Tensor, state: Tensor) -> Iterator[tuple[Tensor, Tensor, _Batches]]:
        """Copies that have batches alike, with the random numbers' state that fetching left."""
        kept = ~self._left_out[:, torch.searchsorted(self._ids, ids)]
        groups: dict[Hashable, tuple[list[int], Tensor, list[_Parts]]] = {}
        for copy, rows in enumerate(kept):
            if bool(rows.any()):
                torch.set_rng_state(state.clone())
                parts = _Parts(self._training.replay.fetch(ids[rows]))
                after = torch.get_rng_state()
                key = (parts.form, after.numpy().tobytes())
                copies, _, batches = groups.setdefault(key, ([], after, []))
                copies.append(copy)
                batches.append(parts)
        for copies, after, batches in groups.values():
            yield torch.tensor(copies), after, _Batches(batches)

    def _gradients(self, copies: Tensor, state: Tensor, batches: _Batches) -> dict[str, Tensor]:
        """Of the losses of some copies, by the parameters that they depend on; buffers follow."""
        model, replay = self._training.model, self._training.replay

        def loss(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, {**parameters, **buffers}, args, kwargs)

            return compute_loss(call, batches.rebuild(tensors), replay.loss_fn).reshape(()) / replay.accumulate

        parameters = {name: each[copies].requires_grad_() for name, each in self._parameters.items()}
        buffers = {name: each[copies] for name, each in self._buffers.items()}
        torch.set_rng_state(state)
        try:
            # Of the kernels of attention, the formula alone has a rule for batches.
            with sdpa_kernel(SDPBackend.MATH):
                total = vmap(loss, randomness="same")(parameters, buffers, batches.tensors).sum()
            found = (
                torch.autograd.grad(total, list(parameters.values()), allow_unused=True) if total.requires_grad else ()
            )
        except Exception as error:
            # Models that look at values, to branch or to log, operators without a rule for batches, and whatever a
            # model makes of tensors that are stacked. If it fails without stacks, too, that is told then.
            raise UnstackableError(str(error).strip().split("\n")[0]) from error
        for name, each in buffers.items():
            self._buffers[name][copies] = each
        return {name: each for name, each in zip(parameters, found, strict=False) if each is not None}


def bytes_of_copy(training: Training, step: LoggedStep) -> int:
    """What a copy takes in memory: parameters, state, gradients and copies of them, and activations of a micro-batch.

    Args:
        training: At its start; its buffers are changed.
        step: The first.
    """
    sizes: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    training.set_options(step)
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        activations = []
        for _ in training.losses(step):
            activations.append(sum(sizes.values()))
            sizes.clear()
    model = training.model
    buffers = sum(each.nbytes for each in model.buffers())
    return 8 * sum(each.nbytes for each in model.parameters()) + 2 * buffers + max(activations, default=0)


class _Parts:
    """A batch taken apart: its tensors, and its form, which is equal for batches that can be stacked."""

    def __init__(self, batch: Any) -> None:
        self.tensors: list[Tensor] = []
        self.rebuild, self.form = self._take(batch)

    def _take(self, part: Any) -> tuple[Callable[[Sequence[Tensor]], Any], Hashable]:
        if isinstance(part, Tensor):
            at = len(self.tensors)
            self.tensors.append(part)
            return (lambda tensors: tensors[at]), (tuple(part.shape), part.dtype)
        if isinstance(part, Mapping):
            taken = {key: self._take(value) for key, value in part.items()}
            form = tuple((key, form) for key, (_, form) in taken.items())
            return (lambda tensors: {key: rebuild(tensors) for key, (rebuild, _) in taken.items()}), ("mapping", form)
        if type(part) in (tuple, list):
            items, kind = [self._take(value) for value in part], type(part)
            return (lambda tensors: kind(rebuild(tensors) for rebuild, _ in items)), (
                kind,
                *(form for _, form in items),
            )
        if not isinstance(part, (bool, int, float, str, type(None))):
            raise UnstackableError(f"a batch holds a {type(part).__name__}, which cannot be stacked")
        return (lambda _: part), (type(part), part)


class _Batches:
    """Batches of the same form.

    Attributes:
        tensors: Of all of them, each with a first dimension for the batches.
    """

    def __init__(self, batches: Sequence[_Parts]) -> None:
        self.tensors = [torch.stack(each) for each in zip(*(batch.tensors for batch in batches), strict=True)]
        self._rebuild = batches[0].rebuild

    def rebuild(self, tensors: Sequence[Tensor]) -> Batch:
        """A batch of these tensors."""
        made: Batch = self._rebuild(tensors)
        return made


def _stack(tensor: Tensor, copies: int) -> Tensor:
    return tensor.detach().expand(copies, *tensor.shape).clone()
