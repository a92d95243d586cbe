"""What fused optimizers share: gathering, the norm, one scalar block, one launch per bucket, the step event.

A fused optimizer inherits from its namesake in ``torch.optim`` (so that checks, defaults, ``state_dict`` and
``isinstance`` are torch's own) and replaces ``step``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gradkern import functional
from gradkern.grad_fold import FOLD_MIN_NUMEL, GradFold, known_partials
from gradkern.ops._chunks import kernel_can_read
from gradkern.ops._table import AddressTable, Operands
from gradkern.ops.step_scalars import reference as scalar_layout
from gradkern.step_event import ParamStep, StepEvent

__all__ = ["Bucket", "FusedStepMixin"]

State = dict[str, Any]

# Attributes by way of map(): with thousands of small tensors, gathering costs as much as the update itself.
_grad = attrgetter("grad")
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_layout = torch.Tensor.layout.__get__  # type: ignore[attr-defined]
_shape = attrgetter("shape")
_is_contiguous = torch.Tensor.is_contiguous
_stride = torch.Tensor.stride


@dataclass(slots=True)
class Bucket:
    """Parameters of one group that one launch updates: same device and dtypes.

    Attributes:
        kernel: Whether kernels can run it; otherwise torch's own update does (fp64, complex, odd strides).
    """

    group: dict[str, Any]
    params: list[torch.Tensor]
    positions: list[int]
    states: list[State]
    kernel: bool
    grads: list[torch.Tensor] = field(default_factory=list)
    operands: Operands | None = None
    step_ids: list[int] = field(default_factory=list)
    step_cache: AddressTable = field(default_factory=AddressTable)
    norm_cache: AddressTable = field(default_factory=AddressTable)

    def column(self, name: str) -> list[torch.Tensor]:
        """One state tensor of every parameter."""
        return list(map(itemgetter(name), self.states))


class _GroupPlan:
    """The buckets of one group, kept while the same parameters have gradients of the same dtypes."""

    __slots__ = ("buckets", "signature", "step_buffer")

    def __init__(self) -> None:
        self.signature: tuple[object, ...] | None = None
        self.buckets: list[Bucket] = []
        self.step_buffer: torch.Tensor | None = None


class FusedStepMixin(torch.optim.Optimizer):
    """Replaces ``step`` of a ``torch.optim`` class; subclasses say what their state is and which op updates it."""

    max_norm: float | None
    # torch.amp.GradScaler then hands its scale and its verdict over instead of reading them on the host.
    _step_supports_amp_scaling = True

    def _start(self, max_norm: float | None) -> None:
        """Finish construction: after torch's ``__init__`` and after unpickling."""
        if max_norm is not None and not max_norm >= 0.0:
            raise ValueError(
                f"{type(self).__name__}: max_norm must be None or at least 0 (inf measures the norm without "
                f"clipping), got {max_norm}"
            )
        self.max_norm = max_norm
        self._plans: list[_GroupPlan] = []
        self._scalars: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None
        self._event_hooks: OrderedDict[int, Callable[[StepEvent], None]] = OrderedDict()
        self._fold = GradFold(self._foldable(), type(self).__name__, share=True)

    # --- for subclasses ---------------------------------------------------------------------------------------------

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State tensors of a parameter, beside ``step``."""
        raise NotImplementedError

    def _operands(self, bucket: Bucket) -> Operands:
        """The operands of our op for a bucket; its gradients are named ``grads``."""
        raise NotImplementedError

    def _launch(self, group: dict[str, Any], operands: Operands, scalars: torch.Tensor) -> None:
        """Update a bucket with our op."""
        raise NotImplementedError

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        """Update a bucket that kernels cannot run, with torch's own functional form; ``step`` counts itself."""
        raise NotImplementedError

    def _param_step(
        self, group: dict[str, Any], param: torch.Tensor, state: State, grad_multiplier: torch.Tensor
    ) -> ParamStep:
        """What the step did to one parameter."""
        raise NotImplementedError

    # --- public -----------------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """L2 norm of all gradients at the last step, before clipping: 0-dim fp32 on the device of the parameters.

        None before the first step and with ``max_norm=None``; ``max_norm=float("inf")`` measures without clipping.
        Reading the value synchronises, asking for the tensor does not.
        """
        if self._scalars is None or self.max_norm is None:
            return None
        return self._scalars[scalar_layout.NORM].float()

    def register_step_event_hook(self, hook: Callable[[StepEvent], None]) -> RemovableHandle:
        """Call ``hook(event)`` after every step; see :mod:`gradkern.step_event`.

        Args:
            hook: Receives a :class:`~gradkern.step_event.StepEvent`; what it needs of it, it must copy.

        Returns:
            A handle whose ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._event_hooks)
        self._event_hooks[handle.id] = hook
        return handle

    def detach(self) -> None:
        """Remove the gradient hooks; the optimizer still works, norming all gradients at ``step()``."""
        self._fold.detach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; gradients of the new parameters are folded too."""
        super().add_param_group(param_group)
        if hasattr(self, "_fold"):
            self._fold.add(self._foldable())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; takes what torch's namesake saved."""
        super().load_state_dict(state_dict)
        self._plans = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_plans" not in self.__dict__:
            self._start(state.get("max_norm"))

    def __getstate__(self) -> dict[str, Any]:
        saved: dict[str, Any] = {**super().__getstate__(), "max_norm": self.max_norm}
        return saved

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip by the global norm and update, in one pass over memory.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: A gradient is sparse (as torch does).
            ValueError: ``max_norm`` is set and gradients lie on more than one device.

        Note:
            Gradients are read, not rewritten. Nothing synchronises with a GPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._gather()
        if not buckets:
            return loss
        try:
            for bucket in buckets:
                # Before any kernel: what is checked here lies in cache still, and nothing has been modified yet.
                bucket.operands = self._operands(bucket) if bucket.kernel else None
            scalars = self._step_scalars(buckets)
            for bucket in buckets:
                if bucket.operands is not None:
                    self._launch(bucket.group, bucket.operands, scalars)
                else:
                    self._update_with_torch(bucket, scalars)
            if self._event_hooks:
                self._report(buckets, scalars)
        finally:
            for bucket in buckets:
                bucket.grads, bucket.operands = [], None  # a bucket must not keep gradients alive past zero_grad()
        return loss

    # --- internals --------------------------------------------------------------------------------------------------

    def _foldable(self) -> list[torch.Tensor]:
        return [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
            and p.is_leaf
            and p.dtype == torch.float32
            and p.numel() >= FOLD_MIN_NUMEL
            and kernel_can_read(p)
        ]

    def _gather(self) -> list[Bucket]:
        while len(self._plans) < len(self.param_groups):
            self._plans.append(_GroupPlan())
        buckets: list[Bucket] = []
        for group, plan in zip(self.param_groups, self._plans, strict=True):
            params = group["params"]
            grads = list(map(_grad, params))
            positions: Sequence[int] = range(len(params))
            if True in map(is_, grads, repeat(None)):
                positions = [i for i in positions if grads[i] is not None]
                params = [params[i] for i in positions]
                grads = [grads[i] for i in positions]
            contiguous = all(map(_is_contiguous, params)) and all(map(_is_contiguous, grads))
            signature = (
                list(map(id, params)),
                list(map(_shape, params)),
                None if contiguous else (list(map(_stride, params)), list(map(_stride, grads))),
                list(map(_dtype, grads)),
                list(map(_layout, grads)),
            )
            if plan.signature != (signature, id(self.state), len(self.state)):
                self._check_grads(grads)
                plan.buckets = self._new_buckets(group, plan, params, grads, positions)
                plan.signature = (signature, id(self.state), len(self.state))  # with the state just made
            if len(plan.buckets) == 1:
                plan.buckets[0].grads = grads
            else:
                grad_at = dict(zip(positions, grads, strict=True))
                for bucket in plan.buckets:
                    bucket.grads = [grad_at[position] for position in bucket.positions]
            buckets.extend(plan.buckets)
        return buckets

    def _check_grads(self, grads: Sequence[torch.Tensor]) -> None:
        """Refuse what no update can take, before any state is made."""
        for grad in grads:
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        if self.max_norm is None:
            return
        plain = (torch.Tensor, torch.nn.Parameter)
        wrapped = next((g for g in grads if type(g) not in plain), None)
        if wrapped is not None:
            raise ValueError(
                f"{type(self).__name__}: max_norm needs plain gradients, got a {type(wrapped).__name__}, whose norm "
                "other processes share; clip with torch.nn.utils.clip_grad_norm_ and pass max_norm=None"
            )
        trained = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        devices = {p.device for p in trained}
        if len(devices) > 1:
            raise ValueError(
                f"{type(self).__name__}: max_norm needs all gradients on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; use one optimizer per device, or max_norm=None"
            )

    def _new_buckets(
        self,
        group: dict[str, Any],
        plan: _GroupPlan,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        positions: Sequence[int],
    ) -> list[Bucket]:
        cells = self._adopt_steps(group, plan)
        names = self._state_names(group)
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for param, grad, position in zip(params, grads, positions, strict=True):
            state = self.state[param]
            if not state:
                state["step"] = cells[position]
                for name in names:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            kernel = _kernel_can_run(param, grad, [state[name] for name in names])
            key = (param.device, param.dtype, grad.dtype, state[names[0]].dtype, kernel)
            if key not in buckets:
                buckets[key] = Bucket(group, [], [], [], kernel)
            bucket = buckets[key]
            bucket.params.append(param)
            bucket.positions.append(position)
            bucket.states.append(state)
        for bucket in buckets.values():
            bucket.step_ids = list(map(id, bucket.column("step")))
        return list(buckets.values())

    def _adopt_steps(self, group: dict[str, Any], plan: _GroupPlan) -> Sequence[torch.Tensor]:
        """Let the step counters of a group be views of one buffer, so that one addition counts them all.

        Returns:
            The cell of every parameter of the group, holding the steps that its state has counted.
        """
        params = group["params"]
        devices = {p.device for p in params}
        plan.step_buffer = torch.zeros(len(params), device=params[0].device) if len(devices) == 1 else None
        cells: Sequence[torch.Tensor]
        if plan.step_buffer is not None:
            cells = plan.step_buffer.unbind()
        else:
            cells = [torch.zeros((), device=p.device) for p in params]
        for cell, param in zip(cells, params, strict=True):
            state = self.state.get(param)
            if state:
                cell.copy_(torch.as_tensor(state["step"]))
                state["step"] = cell
        return cells

    def _step_scalars(self, buckets: Sequence[Bucket]) -> torch.Tensor:
        device = buckets[0].params[0].device
        if self._scalars is None or self._scalars.device != device:
            self._scalars = functional.new_scalars(device)
        # Set by torch.amp.GradScaler for the time of this step. A verdict without a scale means that it has unscaled
        # the gradients already, by an operation that bumps no version: what was folded in backward is then out of date.
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        self._found_inf = getattr(self, "found_inf", None)
        # Collectives on p.grad bump none either.
        trusted = (self._found_inf is None or grad_scale is not None) and not _distributed()
        partials: list[torch.Tensor] = []
        if self.max_norm is not None:
            for bucket in buckets:
                partials.extend(self._partials(bucket, trusted))
        steps: list[torch.Tensor] = []
        for plan in self._plans:
            counted = [bucket for bucket in plan.buckets if bucket.kernel]
            whole = plan.step_buffer is not None and sum(len(b.params) for b in counted) == len(plan.step_buffer)
            # A counter that someone replaced is no cell of the buffer any more.
            if (
                plan.step_buffer is not None
                and whole
                and all(list(map(id, b.column("step"))) == b.step_ids for b in counted)
            ):
                steps.append(plan.step_buffer)
            else:
                steps.extend(state["step"] for bucket in counted for state in bucket.states)
        functional.step_scalars_(
            self._scalars, steps, partials, max_norm=self.max_norm, grad_scale=grad_scale, found_inf=self._found_inf
        )
        return self._scalars

    def _partials(self, bucket: Bucket, trusted: bool) -> list[torch.Tensor]:
        """Sums of squares of a bucket's gradients: those folded in backward, and one pass over the rest."""
        if bucket.operands is None:
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=_wide(g.dtype)).double() for g in bucket.grads])
            return [norms.square()]
        listed = known_partials(bucket.grads) if trusted else None
        if listed is not None:
            return [listed]
        if not trusted or self._fold.size == 0:
            return [functional.sumsq_of(bucket.operands, "grads")]
        folded: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for param, grad in zip(bucket.params, bucket.grads, strict=True):
            partials = self._fold.partials(param, grad)
            if partials is None:
                rest.append(grad)
            else:
                folded.append(partials)
        if rest:
            folded.append(functional.sumsq(rest, cache=bucket.norm_cache))
        return folded

    def _update_with_torch(self, bucket: Bucket, scalars: torch.Tensor) -> None:
        if self._found_inf is not None and bool(self._found_inf):
            return
        scale = getattr(self, "grad_scale", None)
        multiplier = scalars[scalar_layout.CLIP_COEF] / (1.0 if scale is None else scale)
        self._torch_update(bucket, [g * multiplier.to(g.device, g.dtype) for g in bucket.grads])

    def _report(self, buckets: Sequence[Bucket], scalars: torch.Tensor) -> None:
        multiplier = scalars[scalar_layout.GRAD_MULTIPLIER].float()
        params = tuple(
            self._param_step(bucket.group, param, state, multiplier)
            for bucket in buckets
            for param, state in zip(bucket.params, bucket.states, strict=True)
        )
        event = StepEvent(params, None if self._found_inf is None else self._found_inf != 0)
        for hook in list(self._event_hooks.values()):
            hook(event)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _kernel_can_run(param: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor]) -> bool:
    tensors = (param, grad, *states)
    return (
        all(map(kernel_can_read, tensors))
        and len({t.dtype for t in states}) == 1
        and all(t.shape == param.shape and t.stride() == param.stride() for t in tensors)
    )
