"""Inputs of every step op for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._step.codecs import GradTransform, ParamCodec, StateCodec, param_dtypes, state_blocks, state_dtype
from gradkern.ops._step.rule import StepRule
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["step_samples"]

# Elements of a tensor: elements of a unit, which end within chunks, beyond one, beyond two, beyond the tensor.
_UNITS = {63: 37, 0: 5, 4097: 1, 9001: 37, 9002: 5000, 13_000: 9001, 511: 100_000}


def step_samples(rule: StepRule) -> Iterator[Sample]:
    """Every codec on every side, every variant, transforms, unequal steps, edge values, a skipped step."""
    fp32 = torch.float32
    for variant in rule.variants:
        yield _sample(rule, f"variant {variant}", variant=variant)
        yield _sample(rule, f"variant {variant}, edges", variant=variant, edges=True)
        yield _sample(
            rule, f"variant {variant}, bf16", ParamCodec.BFLOAT16, torch.bfloat16, StateCodec.BFLOAT16, variant
        )
    rich = 1 if len(rule.variants) > 1 else 0
    plain = 0 if rule.state_counts[0] else rich
    for param in ParamCodec:
        for grad in DTYPE_CODES:
            yield _sample(rule, f"{param.name} {grad}", param, grad, variant=plain)
        yield _sample(rule, f"{param.name}, edges", param, edges=True, variant=plain)
    for state in StateCodec:
        for edges in (False, True):
            yield _sample(rule, f"state {state.name} {edges=}", state=state, variant=plain, edges=edges)
    small = (ParamCodec.BFLOAT16_SPLIT8, torch.bfloat16, StateCodec.BLOCK8)
    yield _sample(rule, "smallest", *small, variant=plain)
    for transform, sizes in ((GradTransform.LIMIT, SIZES), (GradTransform.UNITS, tuple(_UNITS))):
        for edges in (False, True):
            name = f"{transform.name} {edges=}"
            yield _sample(rule, name, variant=plain, transform=transform, edges=edges, sizes=sizes)
    yield _sample(rule, "descends uphill", variant=plain, hyper=[*rule.sample_hyper[:-1], -1.0])
    yield _sample(rule, "skipped", *small, variant=plain, skip=1.0)
    yield _sample(rule, "zeros", variant=plain, hyper=[rule.sample_hyper[0], *[0.0] * (len(rule.hyper) - 2), 1.0])
    yield _sample(rule, "empty lists", variant=plain, sizes=(), grad=fp32)


def _state_values(sizes: Sequence[int], codec: StateCodec, seed: int, *, signed: bool) -> list[torch.Tensor]:
    if codec == StateCodec.BLOCK8:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in sizes]
    values = [random_values(n, state_dtype(codec), seed=n + seed) for n in sizes]
    return values if signed else [v.abs() for v in values]


def _sample(
    rule: StepRule,
    name: str,
    param: ParamCodec = ParamCodec.FLOAT32,
    grad: torch.dtype = torch.float32,
    state: StateCodec = StateCodec.FLOAT32,
    variant: int = 0,
    *,
    transform: GradTransform = GradTransform.NONE,
    edges: bool = False,
    skip: float = 0.0,
    hyper: Sequence[float] | None = None,
    sizes: Sequence[int] = SIZES,
) -> Sample:
    param_dtype, remainder_dtype = param_dtypes(param)
    remainders: list[torch.Tensor] = []
    if remainder_dtype is not None:
        remainders = [
            random_values(n, remainder_dtype, seed=n + 9)
            if remainder_dtype.is_floating_point
            else (random_values(n, torch.float32, seed=n + 9) * 40).to(remainder_dtype)
            for n in sizes
        ]
    lists = [[random_values(n, param_dtype, seed=n + 1) for n in sizes], remainders]
    present = rule.variant_states(variant)
    for k, rule_state in enumerate(rule.states):
        there = rule_state in present
        lists.append(_state_values(sizes, state, k + 2, signed=rule_state.signed) if there else [])
        lists.append([])
        if there and state == StateCodec.BLOCK8:
            lists[-1] = [torch.arange(100, 100 + state_blocks(n)).clamp(max=140).to(torch.uint8) for n in sizes]
    lists.append([edge_values(n, grad) if edges else random_values(n, grad, seed=n) for n in sizes])
    unit_sizes = [_UNITS[n] for n in sizes] if transform == GradTransform.UNITS else []
    lists.append(
        [
            random_values(-(-n // unit), torch.float32, seed=n + 7)
            for n, unit in zip(sizes, unit_sizes, strict=bool(unit_sizes))
        ]
    )
    lists.append([torch.tensor(float(1 + 37 * i)) for i in range(len(sizes))])
    scalars = torch.tensor([3.0, float(torch.tensor(0.3)), skip, 0.3, 0.0, 0.7, 0.0, 0.0], dtype=torch.float64)
    numbers = torch.tensor([*(rule.sample_hyper if hyper is None else hyper), 2.0**40 + 5.0], dtype=torch.float64)
    return Sample(
        name,
        (*lists, scalars, numbers),
        {
            "variant": variant,
            "param_codec": int(param),
            "state_codec": int(state),
            "transform": int(transform),
            "ids": list(range(3, 3 + len(sizes))),
            "unit_sizes": unit_sizes,
        },
    )
