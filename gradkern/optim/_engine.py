"""The fused step: gather, norm, one block of scalars, one launch per bucket, the step event.

A fused optimizer inherits from its namesake in ``torch.optim`` (so that checks, defaults, ``state_dict`` and
``isinstance`` are torch's own) and replaces ``step``.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypedDict

import torch
from torch.utils.hooks import RemovableHandle

from gradkern import functional
from gradkern.clip.global_norm import GlobalNorm
from gradkern.clip.norms import norm_of_order
from gradkern.clip.policy import ClipPolicy, set_clip_
from gradkern.grad_fold import FOLD_MIN_NUMEL, GradFold, known_partials
from gradkern.ops._chunks import chunk_count, kernel_can_read
from gradkern.ops._step.codecs import GradTransform
from gradkern.ops._step.rule import Codecs, State
from gradkern.ops._step.spec import StepOp
from gradkern.ops.step_scalars import reference as layout
from gradkern.optim._gather import Bucket, Gathering
from gradkern.optim._hyper import HyperBlock
from gradkern.optim._overlap import check_overlap
from gradkern.optim._precision import Precision
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
        if clip is not None and not isinstance(clip, ClipPolicy):
            raise TypeError(
                f"{name}: clip is a {type(clip).__name__}, expected a policy of gradkern.clip such as GlobalNorm(1.0)"
            )
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
        self.clip = clip
        self._skip_nonfinite = options.get("skip_nonfinite", False)
        self._precision = precision
        self._gathering = Gathering(precision, step_in_state=self._STEP_IN_STATE or precision.random())
        self._hyper_blocks: dict[int, HyperBlock] = {}
        self._blocks: list[torch.Tensor] = []
        self._found_inf: torch.Tensor | None = None
        self._event_hooks: OrderedDict[int, Callable[[StepEvent], None]] = OrderedDict()
        self._fold = GradFold(self._foldable(), name, share=True)
        if clip is not None:
            clip.bind(self)

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

    def _param_step(
        self, bucket: Bucket, index: int, numbers: Sequence[float], grad_multiplier: torch.Tensor
    ) -> ParamStep:
        """What the step did to one parameter, given the group's hyper-parameters."""
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
    def max_norm(self) -> float | None:
        """Threshold of the global norm; None where there is none."""
        return self.clip.max_norm if isinstance(self.clip, GlobalNorm) else None

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        if self.clip is not None and not isinstance(self.clip, GlobalNorm):
            raise ValueError(f"{type(self).__name__}: clips by {self.clip!r}, which has no max_norm; set clip instead")
        self.clip = None if value is None else GlobalNorm(value)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients at the last step, before clipping: 0-dim fp32 on the device of the parameters.

        None before the first step and where nothing was measured; ``max_norm=float("inf")`` measures without clipping.
        With a policy that measures every group by itself, the norm of all groups together. Reading the value
        synchronises, asking for the tensor does not.
        """
        if not self._blocks or not self._measures():
            return None
        if len(self._blocks) == 1:
            return self._blocks[0][layout.NORM].float()
        return torch.stack([block[layout.NORM] for block in self._blocks]).square().sum().sqrt().float()

    @property
    def grad_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """L2 norm of every parameter's gradient at the last step, before clipping: 0-dim fp32, by parameter.

        Formed from the sums that the global norm was made of, when asked for; empty where no L2 norm was measured.
        """
        scale = self._last_scale
        norms: dict[torch.Tensor, torch.Tensor] = {}
        for bucket in self._gathering.last:
            for params, partials in bucket.norms:
                chunks = torch.tensor([chunk_count(p.numel()) for p in params], device=partials.device)
                if int(sum(chunk_count(p.numel()) for p in params)) != partials.numel():
                    chunks = torch.ones_like(chunks)  # one sum per parameter: kernels could not read them
                rows = torch.repeat_interleave(torch.arange(len(params), device=partials.device), chunks)
                sums = partials.new_zeros(len(params)).index_add_(0, rows, partials)
                norms.update(zip(params, (sums.sqrt() / scale).float().unbind(), strict=True))
        return norms

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped so far: 0-dim int64 on the device; reading the value synchronises."""
        return self._blocks[0][layout.SKIPPED].long() if self._blocks else torch.zeros((), dtype=torch.int64)

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

    def resync(self) -> None:
        """Take parameters and state as they are now: after changes by ``.data``, which leave no trace."""
        self._gathering.renew_masters()

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
        saved = super().state_dict()
        saved["state"] = {key: dict(state) for key, state in saved["state"].items()}  # plain, for torch.load
        policy = {} if self.clip is None else self.clip.state_dict()
        return {**saved, "clip": policy} if policy else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; takes what torch's namesake saved.

        Raises:
            ValueError: The state was kept in another precision; nothing has been changed then.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        exact: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        for param, saved_id in zip(params, ids, strict=False):
            saved = state_dict["state"].get(saved_id)
            if saved:
                self._precision.check_loaded(type(self).__name__, param, saved, self._OP.rule.states)
                exact.append((param, self._kept_as_saved(param, saved)))
        super().load_state_dict(state_dict)
        for param, kept in exact:  # torch has cast these to the dtype of the parameter
            self.state[param].update(kept)
        if self.clip is not None and "clip" in state_dict:
            self.clip.load_state_dict(state_dict["clip"])
        self._gathering.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_gathering" not in self.__dict__:
            self._start(state.get("_options", {}))

    def __getstate__(self) -> dict[str, Any]:
        options = copy.copy(self._options)
        if self.clip is not None:  # as it is now, and not once more as max_norm
            options.pop("max_norm", None)
            options["clip"] = self.clip
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
        buckets = self._gathering.buckets(self)
        if not buckets:
            return loss
        try:
            self._update(buckets)
        finally:
            for bucket in buckets:
                bucket.grads, bucket.operands = [], None  # a bucket must not keep gradients alive past zero_grad()
        return loss

    # --- internals --------------------------------------------------------------------------------------------------

    def _update(self, buckets: list[Bucket]) -> None:
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        self._found_inf = getattr(self, "found_inf", None)
        scale: torch.Tensor | float = 1.0 if grad_scale is None else grad_scale.double()
        self._last_scale = scale
        transform = GradTransform.NONE if self.clip is None else self.clip.transform
        # Before any kernel: what is checked here lies in cache still, and nothing has been modified yet.
        codecs = [self._prepare(bucket, transform, scale) for bucket in buckets]
        blocks = self._form_scalars(buckets, grad_scale)
        for bucket, bucket_codecs, block in zip(buckets, codecs, blocks, strict=True):
            if bucket.operands is None or bucket_codecs is None:
                self._update_with_torch(bucket, block, scale)
                continue
            hyper = self._hyper_blocks.setdefault(id(bucket.group), HyperBlock()).refresh(
                (*self._hyper(bucket.group), float(self._precision.seed)), block.device
            )
            variant = self._variant(bucket.group)
            functional.step_of_(self._OP, bucket.operands, block, hyper, bucket_codecs, variant)
        self._gathering.remember_versions(buckets)
        if self._event_hooks:
            self._report(buckets, blocks)

    def _prepare(self, bucket: Bucket, transform: GradTransform, scale: torch.Tensor | float) -> Codecs | None:
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
                tensors["units"], integers["unit_sizes"] = self.clip.units(bucket.params, bucket.grads, scale)
                settled = False
        bucket.operands = functional.step_operands(
            self._OP.rule,
            codecs,
            self._variant(bucket.group),
            tensors,
            integers,
            cache=bucket.step_cache,
            settled=settled,
        )
        bucket.settled = True
        return codecs

    def _measures(self) -> bool:
        return self._skip_nonfinite or (self.clip is not None and self.clip.norm_type is not None)

    def _form_scalars(self, buckets: list[Bucket], grad_scale: torch.Tensor | None) -> list[torch.Tensor]:
        """One block of scalars per bucket; buckets that are clipped together share theirs."""
        clip = self.clip
        scopes: dict[int, list[Bucket]] = {}
        for bucket in buckets:
            scopes.setdefault(id(bucket.group) if clip is not None and clip.per_group else 0, []).append(bucket)
        while len(self._blocks) < len(scopes):
            self._blocks.append(functional.new_scalars(buckets[0].device))
        del self._blocks[len(scopes) :]
        counters = self._gathering.counters()
        # Where the verdict of one kernel is not the last word, steps are counted after it.
        late = clip is not None and (clip.skips or clip.error_if_nonfinite or len(scopes) > 1)
        block_of: dict[int, torch.Tensor] = {}
        for index, scope in enumerate(scopes.values()):
            if self._blocks[index].device != scope[0].device:
                self._blocks[index] = self._blocks[index].to(scope[0].device)
            block = self._blocks[index]
            self._form_block(block, scope, [] if late else counters, grad_scale, late=late)
            block_of.update((id(bucket), block) for bucket in scope)
        if late:
            self._settle(counters)
        return [block_of[id(bucket)] for bucket in buckets]

    def _form_block(
        self,
        block: torch.Tensor,
        scope: list[Bucket],
        counters: list[torch.Tensor],
        grad_scale: torch.Tensor | None,
        *,
        late: bool,
    ) -> None:
        clip = self.clip
        skip_nonfinite = self._skip_nonfinite and not late
        shared = None if clip is None else clip.joint(self)
        threshold = math.inf if clip is None else clip.threshold(scope[0].group)
        if shared is not None:
            block[: layout.SKIPPED].copy_(shared[: layout.SKIPPED])
            functional.count_steps_(block, counters, found_inf=self._found_inf, skip_nonfinite=skip_nonfinite)
            return
        if clip is not None and clip.norm_type not in (None, 2.0):
            self._measure_otherwise(block, scope, threshold, grad_scale)
            functional.count_steps_(block, counters, found_inf=self._found_inf, skip_nonfinite=skip_nonfinite)
            return
        partials: list[torch.Tensor] = []
        fresh: list[Bucket] = []  # normed by the kernel that forms the scalars
        if self._measures():
            trusted = self._trusted(grad_scale)
            for bucket in scope:
                if bucket.operands is not None and not self._any_known(bucket, trusted):
                    fresh.append(bucket)
                else:
                    partials.extend(self._partials(bucket, trusted))
        sums = functional.step_scalars_(
            block,
            counters,
            partials,
            grads=[bucket.operands for bucket in fresh if bucket.operands is not None],
            max_norm=threshold,
            grad_scale=grad_scale,
            found_inf=self._found_inf,
            skip_nonfinite=skip_nonfinite,
        )
        for bucket, block_sums in zip(fresh, sums, strict=True):
            bucket.norms = [(bucket.params, block_sums)]
        if clip is not None:
            scale: torch.Tensor | float = 1.0 if grad_scale is None else grad_scale.double()
            if clip.transform == GradTransform.LIMIT:
                block[layout.LIMIT].copy_(torch.as_tensor(clip.limit() * scale))
            clip.decide_(block, scale)

    def _settle(self, counters: list[torch.Tensor]) -> None:
        """Raise or skip for all scopes together, then count the step."""
        first = self._blocks[0]
        if self.clip is not None and self.clip.error_if_nonfinite:
            self._raise_if_nonfinite()
        if len(self._blocks) > 1:
            skip = torch.stack([block[layout.SKIP] for block in self._blocks]).amax()
            if self._skip_nonfinite:
                norms = torch.stack([block[layout.NORM] for block in self._blocks])
                skip = torch.maximum(skip, (~norms.isfinite()).any().to(skip.dtype))
            for block in self._blocks:
                block[layout.SKIP].copy_(skip)
        elif self._skip_nonfinite:
            first[layout.SKIP].copy_(torch.maximum(first[layout.SKIP], (~first[layout.NORM].isfinite()).double()))
        first[layout.SKIPPED].add_(first[layout.SKIP])
        for counter in counters:
            counter.add_(1.0 - first[layout.SKIP])

    def _raise_if_nonfinite(self) -> None:
        norms = [float(block[layout.NORM]) for block in self._blocks]
        if all(map(math.isfinite, norms)):
            return
        names = {
            id(p): name
            for g in self.param_groups
            for p, name in zip(g["params"], g.get("param_names", ()), strict=False)
        }
        numbers = {id(p): i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))}
        guilty = [
            f"{names.get(id(p), f'parameter {numbers[id(p)]}')} {tuple(p.shape)}"
            for bucket in self._gathering.last
            for p, g in zip(bucket.params, bucket.grads, strict=True)
            if not bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all())
        ]
        raise RuntimeError(
            f"The total norm of order {self.clip.norm_type if self.clip else 2.0} for gradients from `parameters` is "
            f"non-finite ({', '.join(map(str, norms))}), so it cannot be clipped; not finite: {', '.join(guilty)}. To "
            "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )

    def _measure_otherwise(
        self, block: torch.Tensor, scope: list[Bucket], threshold: float, grad_scale: torch.Tensor | None
    ) -> None:
        """Norms of another order than 2, by one pass over the gradients."""
        assert self.clip is not None  # noqa: S101  (the caller asks only then)
        order = float(self.clip.norm_type or 2.0)
        scale: torch.Tensor | float = 1.0 if grad_scale is None else grad_scale.double()
        norm = norm_of_order([g for bucket in scope for g in bucket.grads], order) / scale
        coefficient = (threshold / (norm + 1e-6)).clamp(max=1.0) if math.isfinite(threshold) else torch.ones_like(norm)
        block[layout.NORM].copy_(norm)
        set_clip_(block, coefficient, scale)
        self.clip.decide_(block, scale)

    def _trusted(self, grad_scale: torch.Tensor | None) -> bool:
        """Whether nothing can have changed gradients without a trace.

        A verdict without a scale means that torch.amp.GradScaler has unscaled them already, by an operation that bumps
        no version: what was folded in backward is then out of date. Collectives on p.grad bump none either.
        """
        return (self._found_inf is None or grad_scale is not None) and not _distributed()

    def _any_known(self, bucket: Bucket, trusted: bool) -> bool:
        if not trusted:
            return False
        if known_partials(bucket.grads) is not None:
            return True
        return self._fold.size > 0 and any(
            self._fold.partials(p, g) is not None for p, g in zip(bucket.params, bucket.grads, strict=True)
        )

    def _partials(self, bucket: Bucket, trusted: bool) -> list[torch.Tensor]:
        """Sums of squares of a bucket's gradients: those folded in backward, and one pass over the rest."""
        if bucket.operands is None:
            grads = [g.coalesce().values() if g.is_sparse else g for g in bucket.grads]
            norms = [torch.linalg.vector_norm(g, dtype=_wide(g.dtype)).double() for g in grads]
            sums = torch.stack(norms).square()
            bucket.norms = [(bucket.params, sums)]
            return [sums]
        listed = known_partials(bucket.grads) if trusted else None
        if listed is not None:
            bucket.norms = [(bucket.params, listed)]
            return [listed]
        if not trusted or self._fold.size == 0:
            sums = functional.sumsq_of(bucket.operands, "grads")
            bucket.norms = [(bucket.params, sums)]
            return [sums]
        bucket.norms = []
        rest: list[tuple[torch.Tensor, torch.Tensor]] = []
        for param, grad in zip(bucket.params, bucket.grads, strict=True):
            partials = self._fold.partials(param, grad)
            if partials is None:
                rest.append((param, grad))
            else:
                bucket.norms.append(([param], partials))
        if rest:
            sums = functional.sumsq([g for _, g in rest], cache=bucket.norm_cache)
            bucket.norms.append(([p for p, _ in rest], sums))
        return [partials for _, partials in bucket.norms]

    def norm_partials(self) -> list[torch.Tensor]:
        """Sums of squares of all gradients, for a norm over several optimizers; fp64, one per chunk of 4,096."""
        buckets = self._gathering.buckets(self)
        trusted = self._trusted(getattr(self, "grad_scale", None)) and getattr(self, "found_inf", None) is None
        try:
            for bucket in buckets:
                self._prepare(bucket, GradTransform.NONE, 1.0)
            return [block for bucket in buckets for block in self._partials(bucket, trusted)]
        finally:
            for bucket in buckets:
                bucket.grads, bucket.operands = [], None

    def _update_with_torch(self, bucket: Bucket, block: torch.Tensor, scale: torch.Tensor | float) -> None:
        if self._can_skip() and bool(block[layout.SKIP]):
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

    def _can_skip(self) -> bool:
        return self._found_inf is not None or self._skip_nonfinite or (self.clip is not None and self.clip.skips)

    def _report(self, buckets: Sequence[Bucket], blocks: Sequence[torch.Tensor]) -> None:
        params = tuple(
            self._param_step(
                bucket,
                index,
                [float(value) for value in self._hyper(bucket.group)],
                block[layout.GRAD_MULTIPLIER].float(),
            )
            for bucket, block in zip(buckets, blocks, strict=True)
            for index in range(len(bucket.params))
        )
        event = StepEvent(params, blocks[0][layout.SKIP] != 0 if self._can_skip() else None)
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
        for grad in grads:
            if grad.is_sparse:
                self._check_sparse()
        check_overlap(name, params)
        if not self._measures():
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

    def _check_sparse(self) -> None:
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _kept_as_saved(self, param: torch.Tensor, saved: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors of a saved state that keep their dtype: those whose dtype the precision fixes, not the parameter."""
        names = [f"{state.name}_scale" for state in self._OP.rule.states] + ["master"]
        if self._precision.state is not None or self._precision.master is not None:
            names += [state.name for state in self._OP.rule.states]
        return {
            name: saved[name].detach().clone().to(param.device)
            for name in names
            if isinstance(saved.get(name), torch.Tensor)
        }


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64
