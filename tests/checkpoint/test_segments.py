"""Units recomputed together, nested: the bits of every gradient, what is held, and how often what runs."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from checkpoint_cases import CASES, gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradkern.checkpoint import measure_peak
from gradkern.checkpoint._apply import apply_recompute, remove_recompute
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._segments import names_in
from gradkern.checkpoint._units import find_units
from gradkern.testing import same_bits


def applied(model, *nests):
    names = [name for nest in nests for name in names_in(nest)]
    norms = {
        name: tuple(
            buffer for buffer, _ in model.get_submodule(name).named_buffers() if "running" in buffer or "num" in buffer
        )
        for name in names
    }
    apply_recompute(model, {name: Recompute(norms[name]) for name in names}, nests, plan_id="test")


def gradients(case, model=None):
    model = case.model if model is None else model
    torch.manual_seed(7)
    case.loss(model).backward()
    found = [param.grad for param in model.parameters()]
    model.zero_grad()
    return [*found, *(buffer.clone() for buffer in model.buffers())]


@st.composite
def nests(draw, names):
    """Some way to put consecutive names into segments, those into segments, and so on."""

    def split(names, depth):
        items = []
        at = 0
        while at < len(names):
            size = draw(st.integers(1, len(names) - at))
            part = tuple(names[at : at + size])
            items.append(split(part, depth - 1) if depth and draw(st.booleans()) else part[0])
            at += size if isinstance(items[-1], tuple) else 1
        return tuple(items)

    return split(tuple(names), 3)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_nesting_gives_the_same_bits(name, data):
    case = CASES[name]()
    start = copy.deepcopy(case.model.state_dict())
    expected = gradients(case)
    case.model.load_state_dict(start)
    nest = data.draw(nests(find_units(case.model)))
    applied(case.model, nest)
    found = gradients(case)
    remove_recompute(case.model)
    assert all(map(same_bits, found, expected))


class Counted(nn.Module):
    """Says when it runs forward."""

    def __init__(self, at, log):
        super().__init__()
        self.linear, self.at, self.log = nn.Linear(64, 64), at, log

    def forward(self, x):
        self.log.append(self.at)
        return x + torch.tanh(self.linear(x))


def counted(count=8):
    log = []
    return nn.Sequential(*(Counted(at, log) for at in range(count))), log


@pytest.mark.parametrize(
    ("nest", "again"),
    [
        (("0", "1", "2", "3"), [0, 1, 2, 3]),
        (("0", ("1", "2"), "3"), [0, 1, 2, 3, 1, 2]),
        ((("0", "1"), ("2", "3")), [0, 1, 2, 3, 2, 3, 0, 1]),
        (("0", ("1", ("2", "3"))), [0, 1, 2, 3, 1, 2, 3, 2, 3]),
    ],
)
def test_what_runs_again_and_when(nest, again):
    model, log = counted(4)
    x = torch.randn(4, 64)
    applied(model, nest)
    model(x).sum().backward()
    assert log == [0, 1, 2, 3, *again]


def live_peak(model, x, *nests):
    if nests:
        applied(model, *nests)
    model(x).sum().backward()
    model.zero_grad()
    peak = measure_peak(lambda: model(x).sum().backward(), model=model)
    model.zero_grad()
    if nests:
        remove_recompute(model)
    return peak.peak_bytes - peak.start_bytes


def test_only_what_flows_in_is_held():
    model, _ = counted(16)
    x = torch.randn(1024, 64)
    boundary = x.nbytes
    kept = live_peak(model, x)
    single = live_peak(model, x, *((str(at),) for at in range(16)))
    pairs = live_peak(model, x, *((str(at), str(at + 1)) for at in range(0, 16, 2)))
    halves = live_peak(model, x, tuple(map(str, range(8))), tuple(map(str, range(8, 16))))
    tree = live_peak(model, x, *((((str(at), str(at + 1)), (str(at + 2), str(at + 3)))) for at in range(0, 16, 4)))
    # Every unit holds its input and the output of tanh; recomputed alone, its input.
    assert kept > 32 * boundary
    assert single < 16 * boundary + 8 * boundary
    assert pairs < single
    assert halves < kept - 14 * boundary
    assert tree < pairs


def test_a_segment_of_one_is_a_recomputed_unit(gpt2_case):
    names = find_units(gpt2_case.model)
    expected = gradients(gpt2_case)
    applied(gpt2_case.model, *((name,) for name in names))
    assert all(map(same_bits, gradients(gpt2_case), expected))


def test_copies_and_pickles_run_on_their_own(gpt2_case):
    names = find_units(gpt2_case.model)
    expected = gradients(gpt2_case)
    applied(gpt2_case.model, (names[0], (names[1], names[2]), names[3]))
    gpt2_case.loss()  # leaves nothing behind that a copy could not take along
    for other in (copy.deepcopy(gpt2_case.model), pickle.loads(pickle.dumps(gpt2_case.model))):
        assert all(map(same_bits, gradients(gpt2_case, other), expected))
        forwards = [vars(other.get_submodule(name))["forward"] for name in names]
        assert len({id(forward.segment) for forward in forwards}) == 1
        assert forwards[0].segment is not vars(gpt2_case.model.get_submodule(names[0]))["forward"].segment


def test_autocast_is_the_same_when_run_again():
    model, _ = counted(4)
    x = torch.randn(64, 64)
    found = []
    for nest in ((), ("0", ("1", "2"), "3")):
        if nest:
            applied(model, nest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().sum()
        loss.backward()
        found.append([param.grad for param in model.parameters()])
        model.zero_grad()
    assert all(map(same_bits, *found))


def test_running_backward_twice():
    model, _ = counted(4)
    x = torch.randn(4, 64)
    model(x).sum().backward()
    expected = [2 * param.grad for param in model.parameters()]
    model.zero_grad()
    applied(model, ("0", ("1", "2"), "3"))
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(map(same_bits, [param.grad for param in model.parameters()], expected))


def test_outputs_in_between_are_real_and_have_gradients():
    transformers = pytest.importorskip("transformers", reason="its models return what comes out of every layer")
    case = gpt2(dropout=0.0)
    assert isinstance(case.model, transformers.GPT2LMHeadModel)

    def run():
        output = case.model(**case.batch, output_hidden_states=True)
        (output.loss + sum(hidden.square().mean() for hidden in output.hidden_states)).backward()
        found = [*(param.grad for param in case.model.parameters()), *output.hidden_states]
        case.model.zero_grad()
        return found

    expected = run()
    names = find_units(case.model)
    applied(case.model, (names[0], names[1], (names[2], names[3])))
    assert all(map(same_bits, run(), expected))


class Sides(nn.Module):
    """A unit whose second input comes from outside, and the loop changes what flows between."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Bilinear(16, 16, 16) for _ in range(4))

    def forward(self, x):
        side = torch.sin(x)
        for at, block in enumerate(self.blocks):
            x = block(x, side)
            if at % 2:
                x = x * 0.5
        return x


def test_what_flows_in_from_the_side_and_what_the_loop_changes():
    torch.manual_seed(0)
    model = Sides()
    x = torch.randn(8, 16, requires_grad=True)

    def run():
        (model(x)).square().sum().backward()
        found = [x.grad, *(param.grad for param in model.parameters())]
        x.grad = None
        model.zero_grad()
        return found

    expected = run()
    applied(model, ("blocks.0", ("blocks.1", "blocks.2"), "blocks.3"))
    assert all(map(same_bits, run(), expected))


class Changes(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = x * 1.0
        y = self.blocks[1](self.blocks[0](x))
        x += 1
        return y + x


def test_an_input_changed_in_place_is_an_error_not_a_wrong_gradient():
    model = Changes()
    applied(model, ("blocks.0", "blocks.1"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(2, 8)).sum().backward()


class Drifts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x)) if self.calls == 1 else self.linear(x)[:, :4].repeat(1, 2)


def test_a_unit_that_does_otherwise_is_an_error():
    model = nn.Sequential(Drifts(), Drifts())
    applied(model, ("0", "1"))
    with pytest.raises(RuntimeError, match="plan anew"):
        model(torch.randn(2, 8)).sum().backward()


def test_a_failed_forward_leaves_nothing_behind():
    model, _ = counted(4)
    x = torch.randn(4, 64)
    model(x).sum().backward()
    expected = [param.grad for param in model.parameters()]
    model.zero_grad()
    applied(model, tuple(map(str, range(4))))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(4, 63))
    model[0](x)  # alone, out of order
    model(x).sum().backward()
    assert all(map(same_bits, [param.grad for param in model.parameters()], expected))
    with torch.no_grad():
        assert model(x).shape == (4, 64)


class Loop(nn.Module):
    """What comes out of a unit is changed in place, or cut off, before it goes into the next."""

    def __init__(self, change):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))
        self.change = change

    def forward(self, x):
        for at, block in enumerate(self.blocks):
            x = block(x)
            if at == 1:
                x = self.change(x)
        return x


@pytest.mark.parametrize(
    "change", [lambda x: x.add_(0.5), lambda x: x.detach_(), lambda x: x.mul_(2)], ids=["add", "detach", "mul"]
)
def test_what_the_loop_does_in_place_is_not_taken_for_what_came_out(change):
    torch.manual_seed(0)
    model, x = Loop(change), torch.randn(4, 8)

    def run():
        model(x).square().sum().backward()
        found = [param.grad for param in model.parameters() if param.grad is not None]
        model.zero_grad()
        return found

    expected = run()
    applied(model, ("blocks.0", ("blocks.1", "blocks.2"), "blocks.3"))
    found = run()
    assert len(found) == len(expected)
    assert all(map(same_bits, found, expected))


def test_noise_that_is_filled_in_late_is_there():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.RReLU()) for _ in range(4))).train()
    x = torch.randn(4, 8)

    def run():
        torch.manual_seed(1)
        model(x).sum().backward()
        found = [param.grad for param in model.parameters()]
        model.zero_grad()
        return found

    expected = run()
    applied(model, ("0", ("1", "2"), "3"))
    assert all(map(same_bits, run(), expected))


@pytest.mark.parametrize("nests", [(("0", ("1", "2"), "3"),), (("0",), ("1",))])
@pytest.mark.parametrize("is_segment", [True, False])
def test_parameters_that_change_before_backward_are_an_error(nests, is_segment):
    model, _ = counted(4)
    if is_segment:
        applied(model, *nests)
    else:
        names = [name for nest in nests for name in names_in(nest)]
        apply_recompute(model, {name: Recompute() for name in names}, plan_id="test")
    loss = model(torch.randn(4, 64)).sum()
    with torch.no_grad():
        model[0].linear.bias.add_(1)
    with pytest.raises(RuntimeError, match="changed or replaced between its forward and backward"):
        loss.backward()
    new = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    loss = torch.func.functional_call(model, new, torch.randn(4, 64)).sum()
    with pytest.raises(RuntimeError, match="functional_call"):
        loss.backward()


def test_a_failed_step_holds_nothing_for_good():
    model, _ = counted(4)
    applied(model, tuple(map(str, range(4))))
    hook = model[2].register_forward_pre_hook(lambda module, args: 1 / 0)
    x = torch.randn(4096, 64)

    def fail():
        with pytest.raises(ZeroDivisionError):
            model(x)

    fail()
    with torch.no_grad():
        model[0](x)
    gc.collect()
    first = measure_peak(lambda: None, model=model).start_bytes
    fail()
    gc.collect()
    # What flowed into the segment, and no activation besides.
    held = measure_peak(lambda: None, model=model).start_bytes - first
    assert held < x.nbytes
    with torch.no_grad():
        model[0](x)
    gc.collect()
    assert measure_peak(lambda: None, model=model).start_bytes <= first
    hook.remove()


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(torch.tanh(self.linear(x)), 0.5)


@pytest.mark.parametrize("nest", [("0", "1", "2", "3"), ("0", ("1", "2"), "3"), (("0", ("1", "2", "3")),)])
@pytest.mark.parametrize("loop_draws", [False, True])
def test_states_of_the_generator_are_held_where_they_do_not_follow(nest, loop_draws):
    torch.manual_seed(0)
    model = nn.ModuleList([Draws() for _ in range(4)])
    x = torch.randn(8, 4)

    def run():
        torch.manual_seed(3)
        y = x
        for at, unit in enumerate(model):
            y = unit(y)
            if loop_draws and at == 1:
                y = y + torch.rand_like(y)
        return y.square().sum()

    def states():
        held = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype is torch.uint8]
        return sum(each.numel() == torch.get_rng_state().numel() for each in held)

    expected = torch.autograd.grad(run(), list(model.parameters()))
    apply_recompute(model, {name: Recompute() for name in "0123"}, (nest,), plan_id="test")
    before = states()
    loss = run()
    assert states() - before == 1 + loop_draws
    assert all(map(same_bits, torch.autograd.grad(loss, list(model.parameters())), expected))
    remove_recompute(model)
