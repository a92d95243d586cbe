"""Planning for a GPU that is not here: against what runs here, and against arithmetic by hand."""

from __future__ import annotations

import contextlib
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_cases import CASES, gpt2, mlp
from torch import nn

import gradkern as gk
from gradkern.checkpoint import plan
from gradkern.checkpoint._gpus import GPUS, find_gpu
from gradkern.checkpoint._roofline import operator_seconds
from gradkern.checkpoint._simulate import Simulation
from gradkern.errors import PlanInfeasibleError
from gradkern.testing import same_bits

H100 = find_gpu("h100")


def simulated(case, budget="10 GiB", **options):
    return plan(case.model, case.batch, case.loss_fn, budget=budget, gpu="H100", **options)


def budgets(made, count=4):
    low, high = made.least_feasible_bytes, made.natural_peak_bytes
    return [low + (high - low) * at // (count - 1) for at in range(count)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_peak_is_that_of_a_run_here(name, accumulate):
    # With dropout, attention on a CPU computes its scores one by one and saves them.
    case = gpt2(dropout=0.0) if name == "gpt2" else CASES[name]()
    # As on a GPU, where torch steps all tensors at once.
    optimizer = torch.optim.AdamW(case.model.parameters(), foreach=True)
    here = plan(case.model, case.batch, case.loss_fn, budget="1 GiB", optimizer=optimizer, accumulate=accumulate)
    there = simulated(case, optimizer=optimizer, accumulate=accumulate)
    assert there.source == "simulated H100"
    assert [unit.name for unit in there.units] == [unit.name for unit in here.units]
    # What is alive all through here counts what else this process holds.
    above = [made.natural_peak_bytes - made.fixed_bytes for made in (here, there)]
    assert above[1] == pytest.approx(above[0], rel=0.06)
    for ours, theirs in zip(here.units, there.units, strict=True):
        for option, other in zip(ours.options[:2], theirs.options[:2], strict=True):
            assert other.saved_bytes == pytest.approx(option.saved_bytes, rel=0.02, abs=20_000)  # blocks of 512


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_plan_holds_and_a_smaller_budget_is_refused(name):
    case = CASES[name]()
    free = simulated(case)
    assert free.predicted_peak_bytes == free.natural_peak_bytes
    for budget in budgets(free):
        made = simulated(case, budget)
        assert made.predicted_peak_bytes <= budget
        assert made.modelled_peak_bytes == pytest.approx(made.predicted_peak_bytes, rel=0.05)
    with pytest.raises(PlanInfeasibleError) as refused:
        simulated(case, 1000)
    least = simulated(case, refused.value.least_feasible_bytes)
    assert least.predicted_peak_bytes == least.least_feasible_bytes <= free.least_feasible_bytes
    with pytest.raises(PlanInfeasibleError):
        simulated(case, least.least_feasible_bytes - 1)


def test_shapes_alone_give_the_same_plan():
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers")
    case = gpt2()
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(case.model.config)
    ids = case.batch["input_ids"].to("meta")
    batch = dict.fromkeys(case.batch, ids)
    optimizer = torch.optim.AdamW(case.model.parameters())
    real = simulated(case, optimizer=optimizer)
    shapes = plan(model, batch, budget="10 GiB", optimizer=torch.optim.AdamW(model.parameters()), gpu="H100")
    assert shapes == real
    shapes.apply(case.model)
    shapes.remove(case.model)


def test_a_plan_for_a_gpu_changes_no_gradient_here(gpt2_case):
    free = simulated(gpt2_case)
    made = simulated(gpt2_case, (free.least_feasible_bytes + free.natural_peak_bytes) // 2)
    assert any(unit.option != "keep" for unit in made.units)
    gradients = []
    for planned in (False, True):
        if planned:
            made.apply(gpt2_case.model)
        torch.manual_seed(3)
        gpt2_case.loss().backward()
        gradients.append([param.grad for param in gpt2_case.model.parameters()])
        gpt2_case.model.zero_grad()
    assert all(map(same_bits, *gradients))


def test_simulating_touches_nothing(gpt2_case):
    optimizer = torch.optim.AdamW(gpt2_case.model.parameters())
    gpt2_case.loss().backward()
    optimizer.step()
    before = [p.detach().clone() for p in gpt2_case.model.parameters()]
    grads = [p.grad for p in gpt2_case.model.parameters()]
    state = torch.get_rng_state()
    attention = nn.functional.scaled_dot_product_attention
    gpt2_case.model.eval()
    simulated(gpt2_case, optimizer=optimizer)
    assert all(map(same_bits, before, gpt2_case.model.parameters()))
    assert all(p.grad is grad for p, grad in zip(gpt2_case.model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not gpt2_case.model.training
    assert nn.functional.scaled_dot_product_attention is attention


def test_existing_and_missing_optimizer_state_count_alike(mlp_case):
    optimizer = torch.optim.AdamW(mlp_case.model.parameters())
    missing = simulated(mlp_case, optimizer=optimizer)
    mlp_case.cycle(optimizer)
    existing = simulated(mlp_case, optimizer=optimizer)
    assert existing.natural_peak_bytes == missing.natural_peak_bytes


class Attention(nn.Module):
    def __init__(self, dropout, mask=None, kv_heads=4):
        super().__init__()
        self.dropout, self.mask, self.kv_heads = dropout, mask, kv_heads
        self.qkv = nn.Linear(64, 64 + 2 * 16 * kv_heads, bias=False)

    def forward(self, x):
        query, key, value = self.qkv(x).split([64, 16 * self.kv_heads, 16 * self.kv_heads], -1)
        query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in (query, key, value))
        attend = nn.functional.scaled_dot_product_attention
        out = attend(query, key, value, self.mask, self.dropout, enable_gqa=self.kv_heads < 4)
        return x + out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_saves_no_scores(dropout, kv_heads):
    rows, width = 256, 64
    model = nn.Sequential(*(Attention(dropout, kv_heads=kv_heads) for _ in range(3))).to(torch.bfloat16)
    batch = torch.zeros(2, rows, width, dtype=torch.bfloat16)
    made = plan(model, batch, lambda y, _: y.float().square().mean(), budget="10 GiB", gpu="H100")
    middle = made.units[2].options[0].saved_bytes
    # Its output, queries with keys and values, what attention gave, and a number in fp32 a row and head.
    tensors = 2 * (2 * rows * width) * 2 + 2 * rows * (width + 2 * 16 * kv_heads) * 2
    assert tensors + 4 * 2 * rows * 4 <= middle <= tensors + 4 * 2 * rows * 4 + 4096
    scores = 2 * 4 * rows * rows * 2
    assert middle < scores


def test_masked_and_fp32_attention_save_no_scores_either():
    mask = torch.ones(256, 256).tril().bool()
    model = nn.Sequential(*(Attention(0.1, mask) for _ in range(3)))
    made = plan(model, torch.zeros(2, 256, 64), lambda y, _: y.square().mean(), budget="10 GiB", gpu="A100-80")
    assert made.units[2].options[0].saved_bytes < 2 * 4 * 256 * 256 * 4


def test_shards_divide_what_fsdp_divides():
    case = mlp()
    optimizer = torch.optim.AdamW(case.model.parameters(), foreach=True)
    whole, spread = (simulated(case, optimizer=optimizer, shards=count) for count in (1, 8))
    assert spread.source == "simulated H100, 1 of 8 shards"
    params = sum(p.nbytes for p in case.model.parameters())
    blocks = sorted(sum(p.nbytes for p in block.parameters()) for block in case.model[1:6])
    outside = params - sum(blocks)
    # Parameters, and two moments of each; whole are what is in no block and two blocks.
    saved = 3 * params * 7 / 8 - outside - sum(blocks[-2:])
    assert whole.fixed_bytes - spread.fixed_bytes == pytest.approx(saved, abs=512 * 100)
    assert spread.floor_bytes < whole.floor_bytes / 4


class Branches(nn.Module):
    """Runs one of two ways, by a value."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.inner(x) if float(x.detach().sum()) > -1e9 else x


def test_control_flow_by_values_runs_the_model_itself_and_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(*(Branches() for _ in range(4)))
    told = []
    options = {"budget": "10 GiB", "gpu": "H100"}
    made = plan(model, torch.randn(64, 32), lambda y, _: y.square().mean(), progress=told.append, **options)
    assert made.source == "simulated H100, run on real values"
    assert any("depends on values" in text for text in told)
    assert all(param.grad is None for param in model.parameters())
    with pytest.raises(ValueError, match=r"depends on values.*small model of the same kind"):
        plan(model.to("meta"), torch.randn(64, 32, device="meta"), lambda y, _: y.square().mean(), **options)


def test_arguments():
    case = mlp()
    with pytest.raises(ValueError, match=r"no data sheet for the GPU 'H10'.*A100-40.*did you mean H100\?"):
        plan(case.model, case.batch, case.loss_fn, budget="1 GiB", gpu="H10")
    with pytest.raises(TypeError, match="gpu must be a name"):
        plan(case.model, case.batch, case.loss_fn, budget="1 GiB", gpu=100)
    with pytest.raises(ValueError, match="shards=2 needs gpu="):
        plan(case.model, case.batch, case.loss_fn, budget="1 GiB", shards=2)
    with pytest.raises(ValueError, match="shards must be at least 1"):
        simulated(case, shards=0)
    with pytest.raises(TypeError, match="shards must be an int"):
        simulated(case, shards=True)
    with pytest.raises(ValueError, match="got tensors on cpu, meta"):
        plan(case.model.to("meta"), case.batch, case.loss_fn, budget="1 GiB")


def test_every_gpu_is_found_by_its_name():
    assert {gpu.name for gpu in GPUS.values()} == {"A100-40", "A100-80", "H100", "H200", "B200", "RTX4090", "MI300X"}
    assert all(find_gpu(gpu.name.lower()) is gpu for gpu in GPUS.values())
    assert find_gpu("RTX 4090").memory_bytes == 24 * 10**9


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 989.4e12), (torch.float32, 66.9e12)])
def test_seconds_are_the_larger_of_arithmetic_and_traffic(dtype, rate):
    big, thin = torch.empty(4096, 4096, dtype=dtype, device="meta"), torch.empty(4096, 1, dtype=dtype, device="meta")
    matmul, add = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
    assert operator_seconds(matmul, (big, big), {}, big, H100) == pytest.approx(2 * 4096**3 / rate)
    size = big.element_size()
    assert operator_seconds(matmul, (big, thin), {}, thin, H100) == pytest.approx((4096**2 + 8192) * size / 3.35e12)
    assert operator_seconds(add, (big, big), {}, big, H100) == pytest.approx(3 * 4096**2 * size / 3.35e12)
    rows = torch.empty(8, 4096, dtype=dtype, device="meta")
    assert operator_seconds(torch.ops.aten._unsafe_view.default, (big, [-1]), {}, big.view(-1), H100) == 0
    assert operator_seconds(torch.ops.aten.empty_like.default, (big,), {}, big, H100) == 0
    lookup = torch.ops.aten.embedding.default
    index = torch.empty(8, dtype=torch.long, device="meta")
    assert operator_seconds(lookup, (big, index), {}, rows, H100) == pytest.approx(2 * 8 * 4096 * size / 3.35e12)


def test_live_bytes_follow_frees_and_views():
    simulation = Simulation(H100, 1, compares_bits=False)
    with torch.device("meta"), simulation:
        a = torch.zeros(1000)
        assert simulation.live_bytes == 4096
        b = a.view(10, 100)[3:]
        c = a * 2
        assert simulation.live_bytes == 8192
        del a
        assert simulation.live_bytes == 8192
        del b, c
        assert simulation.live_bytes == 0
        assert simulation.peak_bytes == 8192
    assert simulation.seconds > 0


def test_attention_is_put_back_when_planning_fails():
    attention = nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        plan(nn.Linear(2, 2), torch.zeros(2, 2), lambda y, x: 1 / 0, budget="1 GiB", gpu="H100")
    assert nn.functional.scaled_dot_product_attention is attention


def test_a_fused_optimizer_is_simulated(mlp_case):
    params = list(mlp_case.model.parameters())
    none, fused = simulated(mlp_case), simulated(mlp_case, optimizer=torch.optim.AdamW(params, fused=True))
    assert fused.fixed_bytes - none.fixed_bytes == pytest.approx(2 * sum(p.nbytes for p in params), rel=0.02)


class CastsByDevice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.blocks(x)


def test_autocast_for_the_device_of_a_tensor_runs_the_model():
    made = plan(CastsByDevice(), torch.randn(64, 32), lambda y, _: y.square().mean(), budget="1 GiB", gpu="H100")
    assert made.source == "simulated H100, run on real values"


class Casts(CastsByDevice):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.blocks(x)


def test_autocast_that_does_nothing_is_told_once():
    with pytest.warns(UserWarning, match="has no effect in a simulation") as told:
        plan(Casts(), torch.randn(64, 32), lambda y, _: y.square().mean(), budget="1 GiB", gpu="H100")
    assert len(told) == 1


def test_our_optimizers_are_simulated_too(mlp_case):
    params = sum(p.nbytes for p in mlp_case.model.parameters())
    none, ours = simulated(mlp_case), simulated(mlp_case, optimizer=gk.AdamW(mlp_case.model.parameters()))
    assert ours.fixed_bytes - none.fixed_bytes == pytest.approx(2 * params, rel=0.02)
    foreach = simulated(mlp_case, optimizer=torch.optim.AdamW(mlp_case.model.parameters()))
    assert ours.floor_bytes < foreach.floor_bytes


def test_recorder_counts_on_a_gpu_too(mlp_case):
    class Holder:
        def held_bytes(self):
            return 10**6

    assert simulated(mlp_case, recorder=Holder()).fixed_bytes - simulated(mlp_case).fixed_bytes == 10**6


def test_tensors_that_are_not_the_models_own_keep_their_gradients():
    """A loss that reaches the real parameters would leave gradients without values on them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)))

    def loss_fn(y, _):
        return y.square().mean() + 0.01 * sum(param.square().sum() for param in model.parameters())

    made = plan(model, torch.randn(64, 32), loss_fn, budget="1 GiB", gpu="H100")
    assert made.source == "simulated H100, run on real values"
    assert all(param.grad is None for param in model.parameters())
    assert all(type(param) is nn.Parameter for param in model.parameters())


class Draws(nn.Module):
    def __init__(self, *, looks):
        super().__init__()
        self.linear, self.looks = nn.Linear(8, 8), looks

    def forward(self, x):
        x = self.linear(x) * random.random() * np.random.rand()  # noqa: NPY002
        return x if not self.looks or float(x.detach().sum()) > -1e9 else -x


@pytest.mark.parametrize(("looks", "budget"), [(False, "1 GiB"), (True, "1 GiB"), (False, "1 kB")])
def test_generators_are_left_where_they_were(looks, budget):
    model = nn.Sequential(*(Draws(looks=looks) for _ in range(3)))
    before = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    with contextlib.suppress(PlanInfeasibleError):
        plan(model, torch.randn(4, 8), lambda y, _: y.square().mean(), budget=budget, gpu="H100")
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before  # noqa: NPY002


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(16, 16, 2, batch_first=True)

    def forward(self, x):
        return x + self.inner(x)[0]


def test_recurrent_layers_are_run():
    model, x = nn.Sequential(*(Recurrent() for _ in range(3))), torch.randn(8, 32, 16)
    there = plan(model, x, lambda y, _: y.square().mean(), budget="1 GiB", gpu="H100")
    here = plan(model, x, lambda y, _: y.square().mean(), budget="1 GiB")
    assert there.source == "simulated H100, run on real values"
    above = [made.natural_peak_bytes - made.fixed_bytes for made in (here, there)]
    assert above[1] == pytest.approx(above[0], rel=0.3)


def test_an_optimizer_that_asks_for_values(mlp_case):
    made = simulated(mlp_case, optimizer=torch.optim.Adafactor(mlp_case.model.parameters()))
    assert made.source == "simulated H100, run on real values"


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied"):
        plan(model, torch.zeros(2, 2), lambda y, _: y.mean(), budget="1 GiB", gpu="H100")


def test_units_that_do_not_repeat_are_found_by_validate():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.rise, self.fall = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            return self.fall(torch.tanh(self.rise(x) * random.random()))

    torch.manual_seed(0)
    model = nn.Sequential(*(Scales() for _ in range(4)))
    x, loss_fn = torch.randn(512, 8), lambda y, _: y.square().mean()
    options = {"budget": "1 GiB", "gpu": "H100"}
    free = plan(model, x, loss_fn, **options)
    units = tuple(replace(unit, option="recompute") if len(unit.options) > 1 else unit for unit in free.units)
    made = replace(free, units=units)
    made.apply(model)
    checked = made.validate(model, x, loss_fn)
    assert not checked.same_gradients
    assert checked.plan is not made
    assert all(unit.option == "keep" for unit in checked.plan.units)
    assert checked.plan.validate(model, x, loss_fn).same_gradients
