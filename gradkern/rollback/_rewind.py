"""Going back some steps: the states of parameters, buffers, optimizer and sums after the last steps, bit for bit.

A state is a copy of what later steps build on. What a step leaves alone is held once for all states around it; what it
changes is held whole: differences of bit patterns, packed as small as they go, would save a quarter of it, and packing
them takes longer than many a step.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradkern.clip.policy import ClipPolicy
from gradkern.errors import LedgerError
from gradkern.rollback._json_tensor import from_tensor, to_tensor
from gradkern.rollback._layout import Layout

__all__ = ["State", "StatefulOptimizer", "States", "choose_step", "require_restorable", "restore"]

# The one tensor of a state's file that is none of the state's.
_FACTS = "facts"


class StatefulOptimizer(Protocol):
    """What going back needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in ``torch.optim.Optimizer``."""
        ...

    @property
    def state(self) -> Any:
        """As in ``torch.optim.Optimizer``."""
        ...


@dataclass(frozen=True, slots=True)
class State:
    """What later steps build on, as it was after a step. Its tensors are never changed.

    Attributes:
        step: The recorded steps before it.
        tensors: In host memory: ``parameter/NAME``, ``buffer/NAME``, ``optimizer/KEY/NAME``, ``clip/KEY``,
            ``sums/KEY/NAME``.
        facts: Whatever is no tensor, fit for JSON: ``optimizer``, its class; ``plain``, by name of the parameter what
            its state has beside tensors; ``scale``, ``sums`` and ``is_whole`` of the recorder.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """Those tensors whose names begin with ``name/``, by what follows."""
        return {key[len(name) + 1 :]: each for key, each in self.tensors.items() if key.startswith(f"{name}/")}

    def sums(self) -> dict[str, Any]:
        """What :meth:`gradkern.rollback._shadows.Shadows.load_state_dict` takes."""
        sums: dict[str, Any] = dict(self.facts["sums"])
        for path, tensor in self.group("sums").items():
            key, name = path.split("/", 1)
            sums.setdefault(key, {})[name] = tensor
        return sums

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """By name of the parameter; those without state are missing."""
        found: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in self.facts["plain"].items()}
        for path, tensor in self.group("optimizer").items():
            key, name = path.split("/", 1)
            found.setdefault(name, {})[key] = tensor
        return found

    def resume(self, ledger_id: str | None, layout: Layout) -> dict[str, Any]:
        """What ``Recorder.state_dict()`` would have given after the step."""
        names = [info.name for info in layout.parameters]
        states = self.optimizer_state()
        return {
            "ledger_id": ledger_id,
            "optimizer_steps": {name: int(states.get(name, {}).get("step", 0)) for name in names},
            "steps": self.step,
            "parameter_digest": layout.digest([self.tensors[f"parameter/{name}"] for name in names]),
            "scale": self.facts["scale"],
            "sums": self.sums(),
        }

    def to_file(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        return {**self.tensors, _FACTS: to_tensor(self.facts)}

    @classmethod
    def from_file(cls, step: int, tensors: Mapping[str, Tensor]) -> State:
        """Read what :meth:`to_file` gave."""
        own = {name: tensor for name, tensor in tensors.items() if name != _FACTS}
        return cls(step, own, from_tensor(tensors[_FACTS]))


class States:
    """The states after the last steps of a recording.

    Args:
        model: That is recorded.
        optimizer: That trains it.
        parameters: The trained ones by name.
        most: How many steps one can go back.
    """

    def __init__(
        self, model: nn.Module, optimizer: StatefulOptimizer, parameters: Mapping[str, Tensor], most: int
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._parameters = parameters
        self._kept: deque[State] = deque(maxlen=most + 1)
        # State that was made in steps which were all skipped has to go again: SGD would take it for a momentum.
        self._begun = {name for name, parameter in parameters.items() if optimizer.state.get(parameter)}

    def __iter__(self) -> Iterator[State]:
        return iter(self._kept)

    def keep(self, step: int, stepped: Iterable[str], own: Mapping[str, Any]) -> None:
        """Keep the state as it is now.

        Args:
            step: The recorded steps before it.
            stepped: Names of the parameters that took part in the last.
            own: ``scale``, ``is_whole`` and ``sums`` of the recorder.
        """
        self._begun.update(stepped)
        live = {f"parameter/{name}": parameter for name, parameter in self._parameters.items()}
        live |= {f"buffer/{name}": buffer for name, buffer in self._model.named_buffers()}
        plain: dict[str, dict[str, Any]] = {}
        for name in filter(self._begun.__contains__, self._parameters):
            for key, value in self._optimizer.state.get(self._parameters[name], {}).items():
                if isinstance(value, Tensor):
                    live[f"optimizer/{key}/{name}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
        policy = _policy(self._optimizer)
        live |= {f"clip/{key}": value for key, value in policy.state_dict().items()}
        sums = dict(own["sums"])
        for key, value in own["sums"].items():
            if isinstance(value, Mapping):
                live |= {f"sums/{key}/{name}": tensor for name, tensor in sums.pop(key).items()}
        before = self._kept[-1].tensors if self._kept else {}
        facts = {**own, "sums": sums, "plain": plain, "optimizer": type(self._optimizer).__name__}
        self._kept.append(
            State(step, {name: _copied(tensor, before.get(name)) for name, tensor in live.items()}, facts)
        )

    def before(self, step: int, back: int) -> State:
        """The state ``back`` steps before ``step``.

        Raises:
            ValueError, LedgerError: As :func:`choose_step`.
        """
        wanted = choose_step("recorder.rewind", step, back, [state.step for state in self._kept])
        return next(state for state in self._kept if state.step == wanted)

    def forget_after(self, step: int) -> None:
        """Forget the states of later steps."""
        while self._kept[-1].step > step:
            self._kept.pop()

    def nbytes(self) -> int:
        """Bytes of all states."""
        held = {id(tensor): tensor.nbytes for state in self._kept for tensor in state.tensors.values()}
        return sum(held.values())


def choose_step(caller: str, step: int, back: int, kept: Sequence[int]) -> int:
    """The step ``back`` before ``step``, which must be one of ``kept``.

    Raises:
        ValueError: ``back`` is negative.
        LedgerError: There is no state of that step.
    """
    wanted = step - operator.index(back)
    if wanted > step:
        raise ValueError(f"{caller}: steps must be at least 0, got {back}")
    if wanted not in kept:
        backs = ", ".join(str(step - each) for each in sorted(kept, reverse=True))
        raise LedgerError(
            f"{caller}: the state {back} steps ago, after step {wanted}, is not kept; steps may be {backs}. Record "
            f"with a larger rewind=, or go back to a checkpoint of your own"
        )
    return wanted


def require_restorable(state: State, optimizer: StatefulOptimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse what :func:`restore` cannot do.

    Raises:
        LedgerError: The optimizer is another, or trains other parameters.
        ValueError: It clips by another policy.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained != set(map(id, parameters.values())) or type(optimizer).__name__ != state.facts["optimizer"]:
        raise LedgerError(
            f"rewind: the optimizer is a {type(optimizer).__name__} of {len(trained)} parameters, expected the "
            f"{state.facts['optimizer']} of the {len(parameters)} parameters of this model that were recorded; make it "
            f"as it was made for record()"
        )
    _policy(optimizer).check_loaded(state.group("clip"))


@torch.no_grad()
def restore(state: State, model: nn.Module, optimizer: StatefulOptimizer, parameters: Mapping[str, Tensor]) -> None:
    """Give a model and an optimizer a state, in the memory that they have, and drop the gradients of ``parameters``."""
    for name, value in state.group("parameter").items():
        parameters[name].copy_(value)
        parameters[name].grad = None
    for name, value in state.group("buffer").items():
        _restore_buffer(model, name, value)
    states = state.optimizer_state()
    for name, parameter in parameters.items():
        if name in states:
            _restore_entries(optimizer.state[parameter], states[name], parameter)
        else:
            optimizer.state.pop(parameter, None)
    _policy(optimizer).load_state_dict(state.group("clip"))


def _restore_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    own = module._buffers.get(leaf)
    if own is not None and _is_like(own, value):
        own.copy_(value)
    else:  # replaced by one of another shape, as tables of positions are
        device = value.device if own is None else own.device
        module._buffers[leaf] = value.to(device, copy=True)


def _restore_entries(entries: dict[str, Any], kept: Mapping[str, Any], parameter: Tensor) -> None:
    for key in entries.keys() - kept.keys():
        del entries[key]
    for key, value in kept.items():
        own = entries.get(key)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and _is_like(own, value):
            own.copy_(value)
        elif isinstance(value, Tensor) and value.shape == parameter.shape:
            entries[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        elif isinstance(value, Tensor):
            entries[key] = value.clone()
        else:
            entries[key] = value


def _policy(optimizer: StatefulOptimizer) -> ClipPolicy:
    """How the optimizer clips; a policy without a memory where it does not."""
    policy = getattr(optimizer, "clip", None)
    return policy if isinstance(policy, ClipPolicy) else ClipPolicy()


def _copied(tensor: Tensor, before: Tensor | None) -> Tensor:
    """A copy in host memory, or the one before where not a bit has changed."""
    if before is not None and _is_like(tensor, before):
        now = tensor.detach().cpu()
        if torch.equal(_bits(now), _bits(before)):
            return before
    return tensor.detach().to("cpu", copy=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_like(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype
