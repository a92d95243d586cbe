"""From parameter groups to buckets: what one launch updates, found again at every step as cheaply as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple, Protocol
from weakref import WeakMethod

import torch
from torch.utils.weak import TensorWeakRef

from gradkern.ops._chunks import DTYPE_CODES, kernel_can_read, laid_alike
from gradkern.ops._step.codecs import ParamCodec, StateCodec, param_dtypes
from gradkern.ops._step.columns import scales_of
from gradkern.ops._step.rule import Codecs, State
from gradkern.optim._buckets import Bucket, GroupPlan
from gradkern.optim._precision import Precision
from gradkern.optim._state import Changes, WatchedState, WatchedStates

__all__ = ["Gathered", "Gathering", "kernels_can_update"]

# Attributes by way of map(): with thousands of small tensors, gathering costs as much as the update itself.
_grad = attrgetter("grad")
_version = attrgetter("_version")


class _Found(NamedTuple):
    """What a group has to update at this step."""

    group: dict[str, Any]
    plan: GroupPlan
    params: Sequence[torch.Tensor]
    grads: Sequence[torch.Tensor]
    positions: Sequence[int]
    first_id: int
    same_kinds: bool
    key: object


class Gathered(Protocol):
    """An optimizer whose parameters are gathered."""

    state: Any
    param_groups: list[dict[str, Any]]

    _STEP_IN_STATE: bool

    def _states(self, group: dict[str, Any]) -> tuple[State, ...]:
        """State of each parameter of a group."""

    def _check(self, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        """Refuse what no update can take; called before any state is made."""


class Gathering:
    """Finds the buckets of an optimizer, which hands itself over at every step: neither holds the other alive.

    Args:
        precision: In how many bits it keeps parameters and state.
        step_in_state: Whether ``state["step"]`` counts steps, as in torch's namesake.
    """

    def __init__(self, precision: Precision, *, step_in_state: bool) -> None:
        self._precision = precision
        self._step_in_state = step_in_state
        self._changes = Changes(WeakMethod(self._let_go))
        self._plans: list[GroupPlan] = []
        self._in_use = False
        # Steps of optimizers whose state does not count them: kept here, by parameter.
        self._own_steps: dict[torch.Tensor, torch.Tensor] = {}
        # State made for such, by name: it has begun with the first step that was not skipped.
        self._made: dict[torch.Tensor, dict[str, TensorWeakRef]] = {}
        # Versions of parameters with a master that take no part in steps for the time being.
        self._left: dict[torch.Tensor, int] = {}

    def forget(self) -> None:
        """Look at everything anew at the next step; what is not in the state is lost."""
        self._plans = []
        self._own_steps = {}
        self._made = {}
        self._left = {}

    def recheck(self) -> None:
        """Find and check the buckets anew at the next step."""
        for plan in self._plans:
            plan.key = None

    def counters(self) -> list[torch.Tensor]:
        """Step counters to advance."""
        return [counter for plan in self._plans for counter in plan.counters()]

    def buckets(self, optimizer: Gathered) -> list[Bucket]:
        """The buckets of this step, with their gradients, until :meth:`done`; parameters without one are left out."""
        if not self._watches(optimizer.state):
            self._let_go()
            optimizer.state = WatchedStates(optimizer.state, self._changes)
        self._in_use = True
        groups = optimizer.param_groups
        for plan in self._plans[len(groups) :]:
            self._leave(plan)
        del self._plans[len(groups) :]
        self._plans.extend(GroupPlan() for _ in range(len(groups) - len(self._plans)))
        found: list[_Found] = []
        first_id = 0
        for group, plan in zip(groups, self._plans, strict=True):
            found.append(self._find(optimizer, group, plan, first_id))
            first_id += len(group["params"])
        stale = [f for f in found if not f.plan.holds(f.key, self._changes, same_kinds=f.same_kinds)]
        for group_found in stale:
            optimizer._check(group_found.group, group_found.params, group_found.grads)
        if stale:
            self._plan_anew(optimizer, stale)
        buckets: list[Bucket] = []
        for group_found in found:
            self._hand_out(group_found)
            buckets.extend(group_found.plan.buckets)
        return buckets

    def seen(self) -> None:
        """Everything that was done to the state so far has been found."""
        self._changes.read = False

    def done(self) -> None:
        """After a step: buckets must not keep gradients alive past ``zero_grad()``."""
        self._in_use = False
        for plan in self._plans:
            for bucket in plan.buckets:
                bucket.grads, bucket.operands = [], None

    def remember_versions(self, buckets: Sequence[Bucket]) -> None:
        """After a step: parameters with a master that change from here on were changed from outside."""
        for bucket in buckets:
            if bucket.masters:
                bucket.versions = list(map(_version, bucket.params))

    def trust_masters(self, optimizer: Gathered) -> None:
        """Masters fit their parameters, as they do in a copy of an optimizer; a change from here on is one."""
        self._left = {param: param._version for param, _ in _masters(optimizer)}

    def doubt_masters(self, optimizer: Gathered) -> None:
        """Parameters may have been changed without a trace; and state, which this looks at, been given other memory."""
        for plan in self._plans:
            for bucket in plan.buckets:
                bucket.versions = [-1] * len(bucket.masters)
        self._left = {param: -1 for param, _ in _masters(optimizer)}

    def before_saving(self, optimizer: Gathered) -> None:
        """Bring the state up to date: masters of changed parameters, and nothing where no step was made."""
        active: set[int] = set()
        for plan in self._plans:
            for bucket in plan.buckets:
                if bucket.masters:
                    self._renew_masters(bucket)
                    active.update(map(id, bucket.params))
        for param, master in _masters(optimizer):
            if id(param) not in active:  # else it would cost a pass to find what is known
                self._follow(param, master, self._left.get(param))
        for param in self._not_begun(optimizer):
            # All its steps were skipped: torch, too, makes a momentum of the first gradient, not of zeros.
            state = optimizer.state[param]
            for name in self._made[param].keys() & state.keys():
                del state[name]
            if not state:
                del optimizer.state[param]

    def _not_begun(self, optimizer: Gathered) -> list[torch.Tensor]:
        """Parameters whose state is as it was made: no step was counted, and nobody has replaced any of it."""
        steps = {
            p: self._own_steps[p]
            for p, made in self._made.items()
            if p in self._own_steps and _is_all(made, p, optimizer)
        }
        if not steps:
            return []
        device = next(iter(steps.values())).device  # one read for all
        counted = torch.stack([step.to(device) for step in steps.values()]).tolist()
        return [param for param, count in zip(steps, counted, strict=True) if count == 0.0]

    def _watches(self, state: Any) -> bool:
        """Whether a dictionary tells this optimizer what is done to it, and not another one, or nobody."""
        return isinstance(state, (WatchedState, WatchedStates)) and state.changes is self._changes

    def _let_go(self) -> None:
        """Hold nothing of a state that is being replaced: moved to another device, its memory is free at once."""
        if not self._in_use:
            for plan in self._plans:
                if plan.buckets:
                    self._leave(plan)

    def _leave(self, plan: GroupPlan) -> None:
        for bucket in plan.buckets:
            known = zip(bucket.params, bucket.versions, strict=False)
            self._left.update((p, version) for p, version in known if version is not None)
        plan.buckets, plan.key, plan.step_buffer = [], None, None

    def _find(self, optimizer: Gathered, group: dict[str, Any], plan: GroupPlan, first_id: int) -> _Found:
        params = group["params"]
        grads = list(map(_grad, params))
        positions: Sequence[int] = range(len(params))
        if True in map(is_, grads, repeat(None)):
            positions = [i for i in positions if grads[i] is not None]
            params = [params[i] for i in positions]
            grads = [grads[i] for i in positions]
        same_kinds = plan.recall(params, grads)
        states = optimizer._states(group)
        key = (list(map(id, params)), plan.kinds, states, group.get("differentiable", False))
        return _Found(group, plan, params, grads, positions, first_id, same_kinds, key)

    def _hand_out(self, found: _Found) -> None:
        plan = found.plan
        if len(plan.buckets) == 1:
            plan.buckets[0].grads = list(found.grads)
        else:
            grad_at = dict(zip(found.positions, found.grads, strict=True))
            for bucket in plan.buckets:
                bucket.grads = [grad_at[position] for position in bucket.positions]
        for bucket in plan.buckets:
            bucket.same_kinds = found.same_kinds
            if bucket.masters:
                self._renew_masters(bucket)
            if bucket.relaid:
                bucket.grads = list(map(_laid_as, bucket.grads, bucket.params))

    def _plan_anew(self, optimizer: Gathered, stale: Sequence[_Found]) -> None:
        for found in stale:
            self._leave(found.plan)
            found.plan.buckets = self._new_buckets(optimizer, found)
            found.plan.key = found.key
        for plan in self._plans:  # state made for one group has not changed that of another
            plan.changes = self._changes.count
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._own_steps = {p: step for p, step in self._own_steps.items() if id(p) in present}
        self._made = {p: made for p, made in self._made.items() if id(p) in present}
        self._left = {p: version for p, version in self._left.items() if id(p) in present}

    def _renew_masters(self, bucket: Bucket) -> None:
        if list(map(_version, bucket.params)) != bucket.versions:
            bucket.versions = list(map(self._follow, bucket.params, bucket.masters, bucket.versions))

    def _follow(self, param: torch.Tensor, master: torch.Tensor, then: int | None) -> int:
        """Let a master follow its parameter, whose version was ``then`` when they fitted; None: not known.

        Returns:
            The version of the parameter now.
        """
        now = param._version
        if now != then:
            self._precision.follow(param, master, changed=then is not None)
        return now

    def _new_buckets(self, optimizer: Gathered, found: _Found) -> list[Bucket]:
        group = found.group
        cells = self._adopt_steps(optimizer, group, found.plan)
        states = optimizer._states(group)
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for param, grad, position in zip(found.params, found.grads, found.positions, strict=True):
            readable = kernels_can_update(param, grad) and not group.get("differentiable", False)
            state = self._state_of(optimizer, param, cells[position], states, kernel=readable)
            codecs = self._codecs(optimizer, param, grad, state, states) if readable else None
            key = (param.device, param.dtype, codecs)
            if key not in buckets:
                buckets[key] = Bucket(group, codecs, states)
            bucket = buckets[key]
            bucket.relaid |= codecs is not None and grad.stride() != param.stride()
            bucket.params.append(param)
            bucket.positions.append(position)
            bucket.ids.append(found.first_id + position)
            bucket.steps.append(cells[position])
            for rule_state in states:
                bucket.columns.setdefault(f"{rule_state.name}s", []).append(state[rule_state.name])
                if codecs is not None and codecs.state == StateCodec.BLOCK8:
                    scales = bucket.columns.setdefault(scales_of(rule_state), [])
                    scales.append(state[f"{rule_state.name}_scale"])
            if codecs is not None and param_dtypes(codecs.param)[1] is not None:
                bucket.masters.append(state["master"])
        for bucket in buckets.values():
            if bucket.codecs is not None:
                bucket.hold()
            if bucket.masters:
                bucket.versions = [self._left.pop(p, None) for p in bucket.params]
        return list(buckets.values())

    def _state_of(
        self, optimizer: Gathered, param: torch.Tensor, cell: torch.Tensor, states: tuple[State, ...], *, kernel: bool
    ) -> dict[str, Any]:
        """The state of a parameter, completed; a plain copy, which is read without looking as if the user did."""
        keeps_master = kernel and param_dtypes(self._precision.param_codec(param.dtype))[1] is not None
        if not states and not keeps_master and not self._step_in_state:
            return {}  # as in torch, what has no state has no entry
        state: dict[str, Any] = optimizer.state[param]
        if not self._watches(state):
            state = optimizer.state[param] = WatchedState(state, self._changes)
        plain = dict(state)
        missing = [s for s in states if not isinstance(plain.get(s.name), torch.Tensor)]
        if missing or (keeps_master and "master" not in plain):
            made = self._precision.new_state(param, missing, kernel=kernel)
            new = {name: value for name, value in made.items() if plain.get(name) is None}
            state.update(new)
            if missing and not optimizer._STEP_IN_STATE:
                cell.zero_()  # where steps number random bits only, this one is the first all the same
                self._made[param] = {s.name: TensorWeakRef(new[s.name]) for s in missing}
        if self._step_in_state and plain.get("step") is not cell:
            state["step"] = cell
        return dict(state)

    def _codecs(
        self,
        optimizer: Gathered,
        param: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        states: Sequence[State],
    ) -> Codecs | None:
        """How the operands are stored, or None where the state that there is cannot be read by kernels."""
        codecs = self._precision.codecs(param, grad)
        tensors = [state[s.name] for s in states]
        if self._precision.state is None and tensors:
            # As it was loaded: torch casts state to the dtype of the parameter, users to what they like.
            dtypes = {t.dtype for t in tensors}
            plain = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
            if len(dtypes) != 1 or not dtypes <= plain.keys():
                return None
            codecs = Codecs(codecs.param, codecs.grad, StateCodec(plain[dtypes.pop()]))
        if codecs.param in (ParamCodec.FLOAT32, ParamCodec.BFLOAT16, ParamCodec.FLOAT16):
            masters = []
        else:
            masters = [state["master"]] if "master" in state else []
        misfit = next((t for t in (*tensors, *masters) if not _same_layout(t, param)), None)
        if misfit is not None and self._precision.needs_kernels(param.dtype):
            raise ValueError(
                f"{type(optimizer).__name__}: the state of a parameter of shape {tuple(param.shape)}, stride "
                f"{param.stride()} has shape {tuple(misfit.shape)}, stride {misfit.stride()}, expected the same: "
                "master=, state= and stochastic_rounding= keep it in memory order; lay the parameter out as it was, or "
                "drop its state: del optimizer.state[param]"
            )
        return codecs if misfit is None else None

    def _adopt_steps(self, optimizer: Gathered, group: dict[str, Any], plan: GroupPlan) -> Sequence[torch.Tensor]:
        """Let the step counters of a group be views of one buffer, so that one addition counts them all.

        Returns:
            The cell of every parameter of the group, holding the steps that its state has counted. Where the state
            does not count, a parameter that has state is taken to have made a step, and one that has none not.
        """
        params = group["params"]
        names = [state.name for state in optimizer._states(group)]
        devices = {p.device for p in params}
        alike = len(devices) == 1 and {type(p) for p in params} <= {torch.Tensor, torch.nn.Parameter}
        alike = alike and not params[0].is_meta
        plan.step_buffer = torch.zeros(len(params), device=params[0].device) if alike else None
        cells: Sequence[torch.Tensor]
        if plan.step_buffer is not None:
            cells = plan.step_buffer.unbind()
        else:
            # On the meta device a number would be lost; a fake tensor made so knows it.
            cells = [torch.tensor(0.0, device="cpu" if p.is_meta else p.device) for p in params]
        states = dict(optimizer.state)
        for cell, param in zip(cells, params, strict=True):
            state = states.get(param)
            if state and self._step_in_state:
                if "step" in state:
                    cell.copy_(torch.as_tensor(state["step"]))
                    state["step"] = cell
            elif not self._step_in_state:
                if state and any(isinstance(state.get(name), torch.Tensor) for name in names):
                    if param in self._own_steps:
                        cell.copy_(self._own_steps[param])
                    if param not in self._made or not _is_all(self._made[param], param, optimizer):
                        cell.clamp_(min=1.0)  # the user's own
                self._own_steps[param] = cell
        return cells


def kernels_can_update(param: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether kernels can walk a parameter, and its gradient too once it is laid out as the parameter is."""
    plain = type(grad) in (torch.Tensor, torch.nn.Parameter) and grad.layout == torch.strided
    return kernel_can_read(param) and plain and grad.dtype in DTYPE_CODES and grad.shape == param.shape


def _masters(optimizer: Gathered) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters that have a master, and it."""
    found = [(param, state.get("master")) for param, state in optimizer.state.items()]
    return [(param, master) for param, master in found if isinstance(master, torch.Tensor)]


def _is_all(made: dict[str, TensorWeakRef], param: torch.Tensor, optimizer: Gathered) -> bool:
    """Whether the state of a parameter still is what was made for it."""
    state = optimizer.state.get(param) or {}
    return all(state.get(name) is not None and state[name] is ref() for name, ref in made.items())


def _same_layout(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    return tensor.shape == param.shape and tensor.stride() == param.stride()


def _laid_as(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    if grad.stride() == param.stride():
        return grad
    if laid_alike(grad, param):
        return grad.as_strided(param.shape, param.stride())  # autograd does not care for strides that lead nowhere
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)
