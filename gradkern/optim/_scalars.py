"""The blocks of scalars of a step: norm, clip coefficient, loss scale and verdict, formed on the device."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from gradkern import functional
from gradkern.clip.norms import norm_of_order
from gradkern.clip.policy import ClipPolicy, set_clip_
from gradkern.grad_fold import GradFold, distributed, known_partials
from gradkern.ops._chunks import chunk_count
from gradkern.ops._step.codecs import GradTransform
from gradkern.ops.step_scalars import reference as layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradkern.optim._buckets import Bucket

__all__ = ["StepScalars"]


class StepScalars:
    """Measures the gradients of one optimizer and decides what its steps multiply them by.

    Args:
        fold: What was normed in backward already.
        skip_nonfinite: Skip steps whose norm is NaN or infinite.

    Attributes:
        blocks: Of the last step, one per scope: all buckets, or those of one group where groups are clipped apart.
        scale: Loss scale of the last step: 0-dim fp64, or 1.
        found_inf: Verdict of a gradient scaler on this step, if there is one.
    """

    def __init__(self, fold: GradFold, *, skip_nonfinite: bool) -> None:
        self._fold = fold
        self._always_skip_nonfinite = skip_nonfinite
        self._skip_nonfinite = skip_nonfinite
        self._grad_scale: torch.Tensor | None = None
        self._found_inf_per_device: dict[torch.device, torch.Tensor] | None = None
        # What the per-parameter norms of the last step are made of: parameters, and the partials of all of them.
        self._measured: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._norm_type = 2.0
        self.blocks: list[torch.Tensor] = []
        self.scale: torch.Tensor | float = 1.0
        self.found_inf: torch.Tensor | None = None

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Take what a gradient scaler has left at the optimizer for this step."""
        self._grad_scale = getattr(optimizer, "grad_scale", None)
        self.found_inf = getattr(optimizer, "found_inf", None)
        # gradkern.GradScaler has no verdict to give: it leaves room for ours.
        self._found_inf_per_device = getattr(optimizer, "found_inf_per_device", None)
        self._skip_nonfinite = self._always_skip_nonfinite or self._found_inf_per_device is not None
        self.scale = 1.0 if self._grad_scale is None else self._grad_scale.double()

    def measures(self, clip: ClipPolicy | None) -> bool:
        """Whether steps need a norm."""
        return self._skip_nonfinite or (clip is not None and clip.norm_type is not None)

    def can_skip(self, clip: ClipPolicy | None) -> bool:
        """Whether the step may be skipped."""
        return self.found_inf is not None or self._skip_nonfinite or (clip is not None and clip.skips)

    def norm(self) -> torch.Tensor | None:
        """Norm of all gradients at the last step: 0-dim fp32; None before the first."""
        if not self.blocks:
            return None
        if len(self.blocks) == 1:
            return self.blocks[0][layout.NORM].float()
        norms = torch.stack([block[layout.NORM] for block in self.blocks])
        if self._norm_type == 0.0:
            return norms.sum().float()  # as in torch, it counts tensors
        total: torch.Tensor = torch.linalg.vector_norm(norms, self._norm_type)
        return total.float()

    def norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """L2 norm of every parameter's gradient at the last step, 0-dim fp32, from the sums that are there."""
        norms: dict[torch.Tensor, torch.Tensor] = {}
        for params, partials in self._measured:
            chunks = torch.tensor([chunk_count(p.numel()) for p in params], device=partials.device)
            if int(sum(chunk_count(p.numel()) for p in params)) != partials.numel():
                chunks = torch.ones_like(chunks)  # one sum per parameter: kernels could not read them
            rows = torch.repeat_interleave(torch.arange(len(params), device=partials.device), chunks)
            sums = partials.new_zeros(len(params)).index_add_(0, rows, partials)
            norms.update(zip(params, (sums.sqrt() / self.scale).float().unbind(), strict=True))
        return norms

    def form(
        self,
        optimizer: torch.optim.Optimizer,
        clip: ClipPolicy | None,
        buckets: list[Bucket],
        counters: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Measure, decide, count.

        Args:
            optimizer: Whose step it is.
            clip: Its policy.
            buckets: What it updates, with gradients.
            counters: Step counters; each gains one unless the step is skipped.

        Returns:
            One block per bucket; buckets that are clipped together share theirs.

        Raises:
            RuntimeError: The norm is not finite and the policy wants to know; nothing has been changed then.
        """
        scopes: dict[int, list[Bucket]] = {}
        for bucket in buckets:
            scopes.setdefault(id(bucket.group) if clip is not None and clip.per_group else 0, []).append(bucket)
        while len(self.blocks) < len(scopes):
            self.blocks.append(functional.new_scalars(buckets[0].device))
        del self.blocks[len(scopes) :]
        # Where the verdict of one kernel is not the last word, steps are counted after it.
        late = clip is not None and (clip.skips or clip.error_if_nonfinite or len(scopes) > 1)
        shared = None if clip is None else clip.joint(optimizer)
        if shared is None:  # else it was measured when the first of the optimizers stepped
            self._measured = []
        self._norm_type = 2.0 if clip is None or clip.norm_type is None else clip.norm_type
        block_of: dict[int, torch.Tensor] = {}
        for index, scope in enumerate(scopes.values()):
            if self.blocks[index].device != scope[0].device:
                self.blocks[index] = self.blocks[index].to(scope[0].device)
            block = self.blocks[index]
            self._form_block(clip, shared, block, scope, [] if late else counters, late=late)
            block_of.update((id(bucket), block) for bucket in scope)
        if self._found_inf_per_device is not None:
            norm = torch.stack([block[layout.NORM] for block in self.blocks]).sum()
            self._found_inf_per_device[norm.device] = (~norm.isfinite()).float()
        if late:
            if clip is not None and clip.error_if_nonfinite:
                self._raise_if_nonfinite(optimizer, clip)
            self._settle(counters)
        return [block_of[id(bucket)] for bucket in buckets]

    def partials(self, buckets: Sequence[Bucket], *, trusted: bool = True) -> list[torch.Tensor]:
        """Sums of squares of all gradients, for a norm over several optimizers."""
        trusted = trusted and self._trusted() and self.found_inf is None
        self._measured = []
        return [block for bucket in buckets for block in self._partials(bucket, trusted)]

    def _form_block(
        self,
        clip: ClipPolicy | None,
        shared: torch.Tensor | None,
        block: torch.Tensor,
        scope: list[Bucket],
        counters: list[torch.Tensor],
        *,
        late: bool,
    ) -> None:
        skip_nonfinite = self._skip_nonfinite and not late
        found_inf = None if late else self.found_inf
        threshold = math.inf if clip is None else clip.threshold(scope[0].group)
        if shared is not None:
            block[: layout.SKIPPED].copy_(shared[: layout.SKIPPED])
            functional.count_steps_(block, counters, found_inf=found_inf, skip_nonfinite=skip_nonfinite)
            return
        if clip is not None and clip.norm_type not in (None, 2.0):
            self._measure_otherwise(block, scope, threshold)
            functional.count_steps_(block, counters, found_inf=found_inf, skip_nonfinite=skip_nonfinite)
            clip.decide_(block, self.scale)
            return
        partials: list[torch.Tensor] = []
        fresh: list[Bucket] = []  # normed by the kernel that forms the scalars
        if self.measures(clip):
            trusted = self._trusted()
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
            grad_scale=self._grad_scale,
            found_inf=found_inf,
            skip_nonfinite=skip_nonfinite,
        )
        self._measured.extend((bucket.params, bucket_sums) for bucket, bucket_sums in zip(fresh, sums, strict=True))
        if clip is not None:
            if clip.transform == GradTransform.LIMIT:
                block[layout.LIMIT].copy_(torch.as_tensor(clip.limit() * self.scale))
            clip.decide_(block, self.scale)

    def _settle(self, counters: list[torch.Tensor]) -> None:
        """Skip for all scopes together, then count the step."""
        first = self.blocks[0]
        skip = torch.stack([block[layout.SKIP] for block in self.blocks]).amax()
        if self.found_inf is not None:
            skip = torch.maximum(skip, (self.found_inf.reshape(()) != 0).to(skip.device, skip.dtype))
        if self._skip_nonfinite:
            norms = torch.stack([block[layout.NORM] for block in self.blocks])
            skip = torch.maximum(skip, (~norms.isfinite()).any().to(skip.dtype))
        for block in self.blocks:
            block[layout.SKIP].copy_(skip)
        first[layout.SKIPPED].add_(skip)
        for counter in counters:
            counter.add_(1.0 - skip)

    def _raise_if_nonfinite(self, optimizer: torch.optim.Optimizer, clip: ClipPolicy) -> None:
        norms = [float(block[layout.NORM]) for block in self.blocks]
        if all(map(math.isfinite, norms)):
            return
        guilty = []
        for member in clip.together(optimizer):
            owner = "" if member is optimizer else f"{type(member).__name__}'s "
            number = 0
            for group in member.param_groups:
                for name, param in zip_longest(group.get("param_names", ()), group["params"]):
                    if param.grad is not None and not _is_finite(param.grad):
                        guilty.append(f"{owner}{name or f'parameter {number}'} {tuple(param.shape)}")
                    number += 1
        raise RuntimeError(
            f"The total norm of order {clip.norm_type} for gradients from `parameters` is non-finite "
            f"({', '.join(map(str, norms))}), so it cannot be clipped; not finite: {', '.join(guilty)}. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )

    def _measure_otherwise(self, block: torch.Tensor, scope: list[Bucket], threshold: float) -> None:
        """Norms of another order than 2, by one pass over the gradients."""
        norm = norm_of_order([g for bucket in scope for g in bucket.grads], self._norm_type)
        if self._norm_type != 0.0:  # which counts, and does not measure
            norm = norm / self.scale
        coefficient = (threshold / (norm + 1e-6)).clamp(max=1.0) if math.isfinite(threshold) else torch.ones_like(norm)
        block[layout.NORM].copy_(norm)
        set_clip_(block, coefficient, self.scale)

    def _trusted(self) -> bool:
        """Whether nothing can have changed gradients without a trace.

        A verdict without a scale means that torch.amp.GradScaler has unscaled them already, by an operation that bumps
        no version: what was folded in backward is then out of date. Collectives on p.grad bump none either.
        """
        return (self.found_inf is None or self._grad_scale is not None) and not distributed()

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
        measured = self._measure(bucket, trusted)
        self._measured.extend(measured)
        return [partials for _, partials in measured]

    def _measure(self, bucket: Bucket, trusted: bool) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Parameters, and the sums of squares of their gradients."""
        if bucket.operands is None:
            grads = [g.coalesce().values() if g.is_sparse else g for g in bucket.grads]
            norms = [torch.linalg.vector_norm(g, dtype=_wide(g.dtype)).double() for g in grads]
            return [(bucket.params, torch.stack(norms).square())]
        listed = known_partials(bucket.grads) if trusted else None
        if listed is not None:
            return [(bucket.params, listed)]
        if not trusted or self._fold.size == 0:
            return [(bucket.params, functional.sumsq_of(bucket.operands, "grads"))]
        measured: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        rest: list[tuple[torch.Tensor, torch.Tensor]] = []
        for param, grad in zip(bucket.params, bucket.grads, strict=True):
            partials = self._fold.partials(param, grad)
            if partials is None:
                rest.append((param, grad))
            else:
                measured.append(([param], partials))
        if rest:
            sums = functional.sumsq([g for _, g in rest], cache=bucket.norm_cache)
            measured.append(([p for p, _ in rest], sums))
        return measured


def _is_finite(grad: torch.Tensor) -> bool:
    return bool(torch.isfinite(grad.coalesce().values() if grad.is_sparse else grad).all())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64
