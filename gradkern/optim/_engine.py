"""The fused step: gather, norm, one block of scalars, one launch per bucket, the step event.

A fused optimizer inherits from its namesake in ``torch.optim`` (so that checks, defaults, ``state_dict`` and
``isinstance`` are torch's own) and replaces ``step``.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypedDict

import torch
from torch.utils.hooks import RemovableHandle

from gradkern import functional
from gradkern.clip.global_norm import GlobalNorm
from gradkern.clip.policy import ClipPolicy
from gradkern.grad_fold import FOLD_MIN_NUMEL, GradFold
from gradkern.ops._chunks import kernel_can_read
from gradkern.ops._step.codecs import GradTransform
from gradkern.ops._step.rule import Codecs, State
from gradkern.ops._step.spec import StepOp
from gradkern.ops.step_scalars import reference as layout
from gradkern.optim._buckets import Bucket
from gradkern.optim._gather import Gathering, kernels_can_update
from gradkern.optim._hyper import HyperBlock
from gradkern.optim._overlap import check_overlap
from gradkern.optim._precision import Precision
from gradkern.optim._scalars import StepScalars
from gradkern.step_event import ParamStep, StepEvent

__all__ = ["EngineOptions", "FusedStepMixin"]


class EngineOptions(TypedDict, total=False):
    """Options that every optimizer of gradkern takes beside those of its namesake.

    Attributes:
        max_norm: Short for ``clip=GlobalNorm(max_norm)``; ``inf`` measures without clipping.
        clip: A policy of ``gradkern.clip``. Default None: gradients are neither clipped nor measured.
        skip_nonfinite: Leave parameters and state as they are where a gradient is not finite, decided on the device.
            Default False, as in torch.
        master: ``"fp32"``, ``"split16"`` (the same value in 16 bits beside a bf16 parameter) or ``"split8"`` (8 bits,
            rounded). Default None.
        state: ``"fp32"``, ``"bf16"`` (rounded stochastically) or ``"int8"``. Default None: the dtype of the parameter,
            fp32 where it has a master.
        stochastic_rounding: Of bf16 parameters without a master. Default False.
        seed: Of all random bits, 0 <= seed < 2**53. Default 0.
    """

    max_norm: float | None
    clip: ClipPolicy | None
    skip_nonfinite: bool
    master: str | None
    state: str | None
    stochastic_rounding: bool
    seed: int


class FusedStepMixin(torch.optim.Optimizer):
    """Replaces ``step`` of a ``torch.optim`` class; subclasses name their op and its hyper-parameters."""

    _OP: StepOp
    _STEP_IN_STATE = True
    """Whether ``state["step"]`` counts steps, as in torch's namesake."""

    # torch.amp.GradScaler then hands its scale and its verdict over instead of reading them on the host.
    _step_supports_amp_scaling = True

    def _start(self, options: EngineOptions) -> None:
        """Finish construction: after torch's ``__init__`` and after unpickling."""
        name = type(self).__name__
        unknown = options.keys() - EngineOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {min(unknown)!r}")
        max_norm, clip = options.get("max_norm"), options.get("clip")
        if max_norm is not None and clip is not None:
            raise ValueError(f"{name}: got max_norm={max_norm} and clip={clip!r}, expected one of them")
        self._check_clip(clip)
        if max_norm is not None:
            clip = GlobalNorm(max_norm)
        precision = Precision(
            options.get("master"),
            options.get("state"),
            options.get("stochastic_rounding", False),
            options.get("seed", 0),
        )
        for group in self.param_groups:
            self._check_group(group, precision)
        self._options = options
        self._clip: ClipPolicy | None = None
        self._precision = precision
        self._gathering = Gathering(precision, step_in_state=self._STEP_IN_STATE or precision.random())
        self._hyper_blocks: dict[int, HyperBlock] = {}
        self._in_step: list[Bucket] = []
        self._event_hooks: OrderedDict[int, Callable[[StepEvent], None]] = OrderedDict()
        self._fold = GradFold(self._foldable(), name, share=True)
        self._scalars = StepScalars(self._fold, skip_nonfinite=options.get("skip_nonfinite", False))
        self.clip = clip

    # --- for subclasses ---------------------------------------------------------------------------------------------

    def _variant(self, group: dict[str, Any]) -> int:
        """Variant of the rule that a group runs."""
        return 0

    def _hyper(self, group: dict[str, Any]) -> tuple[float | torch.Tensor, ...]:
        """Hyper-parameters of a group in the order of the rule."""
        raise NotImplementedError

    def _torch_update(self, bucket: Bucket, grads: list[torch.Tensor]) -> None:
        """Update a bucket that kernels cannot run, with torch's own functional form; ``step`` counts itself."""
        raise NotImplementedError

    def _param_steps(
        self, bucket: Bucket, numbers: Sequence[float], grad_multiplier: torch.Tensor
    ) -> Iterator[ParamStep]:
        """What the step did to each parameter of a bucket, given the group's hyper-parameters."""
        raise NotImplementedError

    def _event_obstacle(self) -> str | None:
        """Why steps of this optimizer cannot be told as events; None where they can."""
        if self._precision.random():
            return "values are rounded stochastically"
        if self.clip is not None and self.clip.transform != GradTransform.NONE:
            return f"{type(self.clip).__name__} has no one multiplier for a parameter's gradient"
        return None

    # --- public -----------------------------------------------------------------------------------------------------

    @property
    def clip(self) -> ClipPolicy | None:
        """What is done to gradients before they move parameters; may be set at any time, from the next step on."""
        return self._clip

    @clip.setter
    def clip(self, value: ClipPolicy | None) -> None:
        self._check_clip(value)
        if value is not None:
            value.bind(self)
        if self._clip is not None and self._clip is not value:
            self._clip.unbind(self)
        self._clip = value
        self._gathering.recheck()

    @property
    def max_norm(self) -> float | None:
        """Threshold of the global norm; None where there is none.

        Setting it sets that of the policy, also for other optimizers that share it; None takes the policy away.
        """
        return self.clip.max_norm if isinstance(self.clip, GlobalNorm) else None

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        if self.clip is not None and not isinstance(self.clip, GlobalNorm):
            raise ValueError(f"{type(self).__name__}: clips by {self.clip!r}, which has no max_norm; set clip instead")
        if value is None:
            self.clip = None
        elif self.clip is None:
            self.clip = GlobalNorm(value)
        else:
            self.clip.max_norm = value

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients at the last step, before clipping: 0-dim fp32 on the device of the parameters.

        None before the first step and where nothing was measured; ``max_norm=float("inf")`` measures without clipping.
        With a policy that measures every group by itself, the norm of all groups together. Reading the value
        synchronises, asking for the tensor does not.
        """
        return self._scalars.norm() if self._scalars.measures(self.clip) else None

    @property
    def grad_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """L2 norm of every parameter's gradient at the last step, before clipping: 0-dim fp32, by parameter.

        Formed from the sums that the global norm was made of, when asked for; empty where no L2 norm was measured.
        """
        return self._scalars.norms()

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step is skipped where a gradient is not finite."""
        return bool(self._options.get("skip_nonfinite", False))

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped so far: 0-dim int64 on the device; reading the value synchronises."""
        blocks = self._scalars.blocks
        return blocks[0][layout.SKIPPED].long() if blocks else torch.zeros((), dtype=torch.int64)

    def derives_found_inf(self) -> bool:
        """Whether the norm of a step shows if all gradients are finite.

        ``gradkern.GradScaler`` then leaves a dictionary ``found_inf_per_device`` at the optimizer, to be filled by the
        step, and looks at no gradient itself.
        """
        if self.clip is not None and self.clip.norm_type not in (None, 1.0, 2.0, math.inf):
            return False  # zeros can hide, and powers overflow
        kinds = {type(p.grad) for group in self.param_groups for p in group["params"]}
        return kinds <= {torch.Tensor, torch.nn.Parameter, type(None)}

    def register_step_event_hook(self, hook: Callable[[StepEvent], None]) -> RemovableHandle:
        """Call ``hook(event)`` after every step; see :mod:`gradkern.step_event`.

        Args:
            hook: Receives a :class:`~gradkern.step_event.StepEvent`; what it needs of it, it must copy.

        Returns:
            A handle whose ``remove()`` ends the calls.

        Raises:
            ValueError: What this optimizer does to a parameter is not linear in its gradient.
        """
        obstacle = self._event_obstacle()
        if obstacle is not None:
            raise ValueError(
                f"{type(self).__name__}: steps cannot be told as events, because {obstacle}; use AdamW with a clip "
                "policy that has one multiplier, in full precision"
            )
        handle = RemovableHandle(self._event_hooks)
        self._event_hooks[handle.id] = hook
        return handle

    def detach(self) -> None:
        """Remove the gradient hooks; the optimizer still works, norming all gradients at ``step()``."""
        self._fold.detach()

    def attach(self) -> None:
        """Set the gradient hooks again after :meth:`detach`; an optimizer begins with them."""
        self._fold.add(self._foldable())

    def resync(self) -> None:
        """Look at parameters and state anew, after changes by ``.data``, which leave no trace: masters follow.

        Only masters need it, and state tensors below 16,384 elements that were kept in a list since before the last
        step; what is read from ``optimizer.state`` between two steps is looked at anyway.
        """
        self._gathering.doubt_masters(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; gradients of the new parameters are folded too."""
        super().add_param_group(param_group)
        if hasattr(self, "_fold"):
            try:
                self._check_group(self.param_groups[-1], self._precision)
            except ValueError:
                self.param_groups.pop()
                raise
            self._fold.add(self._foldable())

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; a clip policy with a memory adds ``"clip"``, which torch ignores."""
        self._gathering.before_saving(self)
        saved = super().state_dict()
        saved["state"] = {key: dict(state) for key, state in saved["state"].items()}  # plain, for torch.load
        policy = {} if self.clip is None else self.clip.state_dict()
        return {**saved, "clip": policy} if policy else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; takes what torch's namesake saved.

        Raises:
            ValueError: The state was kept in another precision, or is that of another clip policy; nothing has been
                changed then.
        """
        hooked = state_dict
        exact: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            nonlocal hooked, exact
            hooked, exact = loaded, self._checked_for_loading(loaded)

        def restore(_: torch.optim.Optimizer) -> None:
            for param, kept in exact:  # torch has cast these to the dtype of the parameter
                self.state[param].update(kept)
            if self.clip is not None and "clip" in hooked:
                self.clip.load_state_dict(hooked["clip"])
            self._gathering.forget()

        # After the user's hooks have changed what is loaded, and before they see what became of it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_gathering" not in self.__dict__:
            self._start(state.get("_options", {}))
            self._gathering.trust_masters(self)

    def __getstate__(self) -> dict[str, Any]:
        self._gathering.before_saving(self)
        options = copy.copy(self._options)
        options.pop("max_norm", None)
        options["clip"] = self.clip  # as it is now
        return {**super().__getstate__(), "_options": options}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and update, in one pass over memory.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: A gradient is sparse (where torch's namesake refuses it), or the norm is not finite and the
                policy has ``error_if_nonfinite``; nothing has been changed then.
            ValueError: Gradients to be clipped together lie on more than one device, or parameters overlap.

        Note:
            Gradients are read, not rewritten. Nothing synchronises with a GPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._in_step = self._gathering.buckets(self)
            self._gathering.seen()
            if self._in_step:
                self._update(self._in_step)
        finally:
            self._in_step = []
            self._gathering.done()
        return loss

    # --- internals --------------------------------------------------------------------------------------------------

    def _update(self, buckets: list[Bucket]) -> None:
        self._scalars.begin(self)
        transform = GradTransform.NONE if self.clip is None else self.clip.transform
        # Before any kernel: what is checked here lies in cache still, and nothing has been modified yet.
        codecs = [self._prepare(bucket, transform) for bucket in buckets]
        blocks = self._scalars.form(self, self.clip, buckets, self._gathering.counters())
        for bucket, bucket_codecs, block in zip(buckets, codecs, blocks, strict=True):
            if bucket.operands is None or bucket_codecs is None:
                self._update_with_torch(bucket, block)
                continue
            hyper = self._hyper_blocks.setdefault(id(bucket.group), HyperBlock()).refresh(
                (*self._hyper(bucket.group), float(self._precision.seed)), block.device
            )
            variant = self._variant(bucket.group)
            functional.step_of_(self._OP, bucket.operands, block, hyper, bucket_codecs, variant)
        self._gathering.remember_versions(buckets)
        if self._event_hooks:
            self._report(buckets, blocks)

    def _prepare(self, bucket: Bucket, transform: GradTransform) -> Codecs | None:
        if bucket.codecs is None:
            bucket.operands = None
            return None
        tensors = bucket.tensors()
        integers: dict[str, Sequence[int]] = {"ids": bucket.ids}
        codecs = bucket.codecs
        settled = bucket.settled
        if transform != GradTransform.NONE:
            codecs = Codecs(codecs.param, codecs.grad, codecs.state, transform)
            if transform == GradTransform.UNITS:
                assert self.clip is not None  # noqa: S101  (it has the transform)
                tensors["units"], integers["unit_sizes"] = self.clip.units(
                    bucket.params, bucket.grads, self._scalars.scale
                )
                settled = False
        bucket.operands = functional.step_operands(
            self._OP.rule,
            codecs,
            self._variant(bucket.group),
            tensors,
            integers,
            cache=bucket.step_cache,
            settled=settled,
            same_kinds=bucket.same_kinds,
        )
        bucket.settled = True
        return codecs

    def norm_partials(self, *, trusted: bool = True) -> list[torch.Tensor]:
        """Sums of squares of all gradients, for a norm over several optimizers; fp64, one per chunk of 4,096.

        Args:
            trusted: Take those that were summed in backward where gradients have not changed since. False reads all
                gradients: they may have changed without a trace.
        """
        if self._in_step:
            return self._scalars.partials(self._in_step, trusted=trusted)
        try:
            buckets = self._gathering.buckets(self)
            self._scalars.begin(self)
            for bucket in buckets:
                self._prepare(bucket, GradTransform.NONE)
            return self._scalars.partials(buckets, trusted=trusted)
        finally:
            self._gathering.done()

    def _update_with_torch(self, bucket: Bucket, block: torch.Tensor) -> None:
        scale = self._scalars.scale
        if self._scalars.can_skip(self.clip) and bool(block[layout.SKIP]):
            return
        grads = bucket.grads
        if self.clip is not None and self.clip.transform == GradTransform.LIMIT:
            limit = float(block[layout.LIMIT])
            grads = [g.clamp(-limit, limit) for g in grads]
        elif self.clip is not None and self.clip.transform == GradTransform.UNITS:
            units, sizes = self.clip.units(bucket.params, grads, scale)
            grads = [
                g * u.repeat_interleave(size)[: g.numel()].view(g.shape).to(g.dtype)
                for g, u, size in zip(grads, units, sizes, strict=True)
            ]
        if self.clip is not None or not isinstance(scale, float):
            multiplier = block[layout.CLIP_COEF] / scale
            grads = [g * multiplier.to(g.device, g.dtype) for g in grads]
        with torch.set_grad_enabled(bool(bucket.group.get("differentiable", False))):
            self._torch_update(bucket, list(grads))

    def _report(self, buckets: Sequence[Bucket], blocks: Sequence[torch.Tensor]) -> None:
        params: list[ParamStep] = []
        for bucket, block in zip(buckets, blocks, strict=True):
            numbers = [float(value) for value in self._hyper(bucket.group)]
            params += self._param_steps(bucket, numbers, block[layout.GRAD_MULTIPLIER].float())
        event = StepEvent(tuple(params), blocks[0][layout.SKIP] != 0 if self._scalars.can_skip(self.clip) else None)
        for hook in list(self._event_hooks.values()):
            hook(event)

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

    def _states(self, group: dict[str, Any]) -> tuple[State, ...]:
        return self._OP.rule.variant_states(self._variant(group))

    def _check_group(self, group: dict[str, Any], precision: Precision) -> None:
        name = type(self).__name__
        states = self._states(group)
        precision.check(name, states)
        if precision.state == "int8" and len(states) > 2:
            raise ValueError(
                f"{name}: state='int8' cannot keep {states[2].name}: the largest of stochastically rounded values only "
                "grows; pass amsgrad=False or another state"
            )
        for param in group["params"]:
            precision.check_param(name, param)

    def _check(self, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        """Refuse what no update can take, before any state is made."""
        name = type(self).__name__
        self._check_group(group, self._precision)
        if any(grad.is_sparse for grad in grads):
            self._check_sparse()
            if self.clip is not None and self.clip.transform != GradTransform.NONE:
                raise RuntimeError(
                    f"{name}: {self.clip!r} treats elements or units of a gradient by themselves, got a sparse "
                    "gradient, expected dense ones; clip by norm, or give sparse parameters an optimizer of their own"
                )
        for param, grad in zip(params, grads, strict=True):
            if group.get("differentiable", False) or not kernels_can_update(param, grad):
                self._precision.check_kernels(name, param, grad)
        check_overlap(name, params)
        if not self._scalars.measures(self.clip):
            return
        plain = (torch.Tensor, torch.nn.Parameter)
        wrapped = next((g for g in grads if type(g) not in plain), None)
        if wrapped is not None:
            raise ValueError(
                f"{name}: max_norm needs plain gradients, got a {type(wrapped).__name__}, whose norm other processes "
                "share; clip with torch.nn.utils.clip_grad_norm_ and pass max_norm=None"
            )
        per_group = self.clip is not None and self.clip.per_group
        groups = [group] if per_group else self.param_groups
        devices = {p.device for g in groups for p in g["params"] if p.grad is not None}
        if len(devices) > 1:
            raise ValueError(
                f"{name}: max_norm needs all gradients on one device, got {', '.join(sorted(map(str, devices)))}; use "
                "one optimizer per device, or max_norm=None"
            )

    def _check_clip(self, clip: object) -> None:
        if clip is not None and not isinstance(clip, ClipPolicy):
            raise TypeError(
                f"{type(self).__name__}: clip is a {type(clip).__name__}, expected a policy of gradkern.clip such as "
                "GlobalNorm(1.0)"
            )

    def _check_sparse(self) -> None:
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _checked_for_loading(self, state_dict: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Parameters, and what must be loaded for them as it was saved; refuses what does not fit."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        exact = []
        for param, saved_id in zip(params, ids, strict=False):
            saved = state_dict["state"].get(saved_id)
            if saved:
                self._precision.check_loaded(type(self).__name__, param, saved, self._OP.rule.states)
                exact.append((param, self._kept_as_saved(param, saved)))
        if self.clip is not None and "clip" in state_dict:
            self.clip.check_loaded(state_dict["clip"])
        return exact

    def _kept_as_saved(self, param: torch.Tensor, saved: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors of a saved state that keep their dtype: those whose dtype the precision fixes, not the parameter."""
        names = [f"{state.name}_scale" for state in self._OP.rule.states] + ["master"]
        if self._precision.state is not None or self._precision.master is not None:
            names += [state.name for state in self._OP.rule.states]
        kept: dict[str, torch.Tensor] = {}
        for name in names:
            value = saved.get(name)
            if not isinstance(value, torch.Tensor):
                continue
            kept[name] = value.detach().clone().to(param.device)
            if value.shape == param.shape and value.stride() != param.stride():
                kept[name] = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
        return kept
