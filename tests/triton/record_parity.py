"""Run in its own process with TRITON_INTERPRET=1: the kernels of recording against their references, as bits.

Programs of a launch run in a shuffled order, so that no kernel may rely on the order of its programs.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import shuffled_programs
import torch
from torch import nn

import gradkern as gk
from gradkern.ops._values import edge_values
from gradkern.rollback._layout import ParameterInfo
from gradkern.rollback._reduce import reduce_matrix, reduce_vector
from gradkern.rollback._shadows import Applied, Shadows
from gradkern.step_event import ParamStep
from gradkern.testing import same_bits

Case = tuple[str, Callable[[], list[torch.Tensor]]]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edges(*shape: int, finite: bool = True) -> torch.Tensor:
    """Signed zeros, subnormals, the largest numbers; inf and NaN behind element 600."""
    return edge_values(math.prod(shape), torch.float32, finite=finite).reshape(shape)


def matrices() -> Iterator[Case]:
    """Around 4 and 16 tokens and 64 columns; ranks even, odd and above 4; aligned rows or not."""
    for samples, tokens, height, width, rank in (
        (2, 17, 70, 65, 2),
        (1, 16, 64, 128, 3),
        (1, 6, 4, 132, 1),
        (1, 7, 7, 12, 5),
        (2, 2, 8, 33, 2),
        (1, 1, 300, 5, 2),
    ):
        left, right, start = (
            normal(0, samples, tokens, height),
            normal(1, samples, tokens, width),
            normal(2, rank, width),
        )
        name = f"{samples} x {tokens} x ({height}, {width}), rank {rank}"
        yield name, lambda a=left, b=right, s=start: list(reduce_matrix(a, b, s))
        yield f"{name}, no left", lambda b=right, s=start: list(reduce_matrix(None, b, s))
    start = normal(2, 2, 72)
    small = 1e-38 * normal(3, 1, 5, 72)
    for name, right in (
        ("edges", edges(1, 5, 72)),
        ("edges, not finite", edges(1, 9, 72, finite=False)),
        ("subnormal", small),
        ("zeros", torch.zeros(1, 5, 72)),
        ("dependent rows", normal(4, 1, 1, 72) * normal(5, 1, 5, 1)),
    ):
        left = normal(6, 1, right.shape[1], 8)
        yield name, lambda a=left, b=right: list(reduce_matrix(a, b, start))
        yield f"{name}, as left", lambda a=left, b=right: list(reduce_matrix(b, a, start[:, :8].contiguous()))


def vectors() -> Iterator[Case]:
    for samples, tokens, width in ((3, 7, 65), (2, 8, 256), (1, 1, 300), (2, 1, 5)):
        rows = normal(0, samples, tokens, width)
        yield f"vector {samples} x {tokens} x {width}", lambda rows=rows: list(reduce_vector(rows))
    for name, rows in (
        ("edges", edges(1, 5, 200, finite=False)),
        ("edges of one", edges(3, 1, 500, finite=False)),
        ("ties", torch.arange(-255.0, 256.0).reshape(1, 1, -1) / 2),
        ("subnormal", 1e-40 * normal(1, 1, 1, 100)),
        ("largest", torch.full((1, 3, 5), torch.finfo(torch.float32).max)),
        ("negative zeros", torch.full((1, 5, 5), -0.0)),
    ):
        yield f"vector of {name}", lambda rows=rows: list(reduce_vector(rows))


# Rows around 16, a convolution, vectors, one number, nothing.
SHAPES = [(16, 64), (10, 33), (7,), (3, 4, 3, 3), (1, 5), (130,), (), (0,), (37, 66)]


def followed(has_moment: bool, scale: float) -> list[torch.Tensor]:
    """The shadows of some parameters after steps with and without gradients, one of them refused."""
    parameters = [normal(at, *shape) for at, shape in enumerate(SHAPES)]
    infos = [ParameterInfo(f"p{at}", shape, owned=at != 4) for at, shape in enumerate(SHAPES)]
    shadows = Shadows(parameters, infos)
    found: list[torch.Tensor] = []
    for step in range(2):
        applied = []
        for at, parameter in enumerate(parameters):
            if (step, at) == (1, 1):
                continue  # left alone
            if infos[at].owned and (step, at) != (1, 2):
                shadows.add_gradients([(at, scale * normal(100 * step + at, *SHAPES[at]))])
            moment = (scale * normal(7 * step + at, *SHAPES[at])).square() if has_moment else None
            lr = 0.0 if at == 3 else 1.1e-3
            update = ParamStep(parameter, torch.tensor(0.5), 0.999, 0.9, 0.1, lr, lr, moment, 1.7, 1e-8)
            applied.append(Applied(at, update, 0.5))
        found.append(shadows.step(applied))
    shadows.add_gradients([(8, torch.full(SHAPES[8], math.inf))])
    if shadows.step(applied) is not None:
        found.append(torch.zeros(0))
    state = shadows.state_dict()
    numbers = [state[key] for key in ("roundings", "momentum_roundings", "decays")]
    return [
        *found,
        *state["momenta"].values(),
        *state["deltas"].values(),
        torch.tensor(numbers, dtype=torch.float64),
    ]


def tall() -> list[torch.Tensor]:
    """Rows beyond 256 and beyond 4,096: more levels of the tree of column sums."""
    parameters = [normal(0, 4113, 1), normal(1, 257, 3)]
    shadows = Shadows(parameters, [ParameterInfo(f"p{at}", tuple(p.shape), True) for at, p in enumerate(parameters)])
    updates = [ParamStep(p, torch.tensor(1.0), 1.0, 0.9, 0.1, 1e-3, 1e-3, p.square()) for p in parameters]
    return [shadows.step([Applied(at, update, 1.0) for at, update in enumerate(updates)])]


def shadows() -> Iterator[Case]:
    yield "shadows of tall matrices", tall
    for has_moment in (True, False):
        for scale in (1.0, 1e-22) if has_moment else (1e-38,):
            yield f"shadows, {has_moment=}, {scale=}", lambda a=has_moment, b=scale: followed(a, b)


class Model(nn.Module):
    """Layers of several widths, with and without biases, one called twice; a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))


def ledger_files(backend: str) -> dict[str, bytes]:
    """What recording some steps leaves."""
    torch.manual_seed(0)
    model = Model()
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        with gk.rollback.record(model, optimizer, Path(folder) / "run") as recorder:
            for step in range(2):
                with gk.use_backend(backend):
                    with recorder.batch(range(2)):
                        labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
                        logits = model(normal(step, 2, 3, 6))
                        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
                    optimizer.step()
                optimizer.zero_grad()
        return {file.name: file.read_bytes() for file in Path(folder).rglob("*.safetensors")}


def main() -> int:
    compared, bad = 0, []
    shuffled_programs.shuffle_programs()
    for name, compute in (*matrices(), *vectors(), *shadows()):
        with gk.use_backend("reference"):
            expected = compute()
        with gk.use_backend("triton"):
            got = compute()
        compared += 1
        if len(got) != len(expected) or not all(map(same_bits, got, expected)):
            bad.append(name)
    reference, triton = ledger_files("reference"), ledger_files("triton")
    if len(reference) < 2 or reference != triton:
        bad.append(f"whole ledgers, {[name for name in reference if reference[name] != triton.get(name)]}")
    if shuffled_programs.moved == 0:
        bad.append("no launch was shuffled: the interpreter walks its grid in another way now")
    print(f"compared {compared}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
