from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from checkpoint_cases import Case, gpt2
from torch import nn

from gradkern.checkpoint import measure_peak, plan


def planned(case, budget=None):
    """The plan of least memory (or for a budget): it recomputes as much as pays."""
    free = plan(case.model, case.batch, case.loss_fn, budget="1 GiB")
    return plan(case.model, case.batch, case.loss_fn, budget=budget or free.least_feasible_bytes)


def gradients(case, model):
    torch.manual_seed(11)
    loss = case.loss(model)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    return [loss.detach(), *grads.values(), *(buffer.clone() for buffer in model.buffers())]


def assert_same_bits(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def test_gradients_and_buffers_are_bit_equal(case):
    made = planned(case)
    assert sum(unit.option != "keep" for unit in made.units) >= 2
    plain, wrapped = copy.deepcopy(case.model), case.model
    made.apply(wrapped)
    for _ in range(3):
        assert_same_bits(gradients(case, plain), gradients(case, wrapped))


def test_batch_norm_counts_each_batch_once(cnn_case):
    made = planned(cnn_case)
    recomputed = [unit for unit in made.units if unit.option != "keep"]
    assert all(len(unit.mutated_buffers) == 6 for unit in recomputed)
    made.apply(cnn_case.model)
    for _ in range(3):
        cnn_case.loss().backward()
    counts = {int(buffer) for name, buffer in cnn_case.model.named_buffers() if name.endswith("tracked")}
    assert counts == {3}


class Spectral(nn.Module):
    """A block whose output depends on a buffer that its forward changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.out(torch.tanh(self.linear(x)))


def test_rrelu_at_the_end_of_a_unit():
    torch.manual_seed(5)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.RReLU()) for _ in range(3)]
    case = Case(nn.Sequential(*blocks), torch.randn(256, 64), lambda y, _: y.square().mean())
    made = planned(case)
    assert any(unit.option != "keep" for unit in made.units)
    plain = copy.deepcopy(case.model)
    made.apply(case.model)
    assert_same_bits(gradients(case, plain), gradients(case, case.model))


def test_recomputation_sees_the_buffers_of_the_forward():
    torch.manual_seed(3)
    model = nn.Sequential(*(Spectral() for _ in range(4))).train()
    x = torch.randn(256, 64)

    def loss_fn(y, _):
        return y.square().mean()

    free = plan(model, x, loss_fn, budget="1 GiB")
    made = plan(model, x, loss_fn, budget=free.least_feasible_bytes)
    assert any(unit.mutated_buffers and unit.option != "keep" for unit in made.units)
    plain = copy.deepcopy(model)
    made.apply(model)
    for _ in range(3):
        for one in (plain, model):
            loss_fn(one(x), x).backward()
    assert_same_bits([param.grad for param in plain.parameters()], [param.grad for param in model.parameters()])
    assert_same_bits(list(plain.buffers()), list(model.buffers()))


def test_apply_and_remove_leave_the_model_as_it_was(case):
    made = planned(case)
    model = case.model
    before = {name: (module, dict(vars(module)), type(module)) for name, module in model.named_modules()}
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    made.apply(model)
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        assert module is before[name][0]
        assert type(module) is before[name][2]
    made.remove(model)
    for name, module in model.named_modules():
        assert dict(vars(module)) == before[name][1]
        assert dict(module._forward_pre_hooks) == hooks[name]


def test_deepcopy_and_pickle_carry_the_plan(case):
    made = planned(case)
    natural = measure_peak(lambda: case.loss().backward(), model=case.model)
    case.model.zero_grad()
    reference = gradients(case, copy.deepcopy(case.model))
    made.apply(case.model)
    twin = copy.deepcopy(case.model)
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    copies = twin, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(twin))
    for model in copies:
        assert_same_bits(gradients(case, model), reference)
        peak = measure_peak(lambda model=model: case.loss(model).backward(), model=model)
        assert peak.peak_bytes - peak.start_bytes < 0.9 * (natural.peak_bytes - natural.start_bytes)
        model.zero_grad()
        made.remove(model)
        with pytest.raises(RuntimeError, match="nothing to remove"):
            made.remove(model)
    made.remove(case.model)


def test_copy_uses_its_own_parameters(mlp_case):
    made = planned(mlp_case)
    made.apply(mlp_case.model)
    twin = copy.deepcopy(mlp_case.model)
    with torch.no_grad():
        for param in mlp_case.model.parameters():
            param.zero_()
    mlp_case.loss(twin).backward()
    assert all(param.grad is None for param in mlp_case.model.parameters())
    assert all(param.grad.abs().sum() > 0 for param in twin.parameters())


def test_misuse_is_named_and_changes_nothing(mlp_case):
    made = planned(mlp_case)
    other = plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, budget="1 GiB")
    with pytest.raises(RuntimeError, match="nothing to remove"):
        made.remove(mlp_case.model)
    made.apply(mlp_case.model)
    with pytest.raises(RuntimeError, match="this plan is applied"):
        made.apply(mlp_case.model)
    with pytest.raises(RuntimeError, match="another plan is applied"):
        other.apply(mlp_case.model)
    with pytest.raises(RuntimeError, match="another plan is applied"):
        other.remove(mlp_case.model)
    with pytest.raises(RuntimeError, match="remove it before planning"):
        planned(mlp_case)
    made.remove(mlp_case.model)
    foreign = copy.deepcopy(mlp_case.model)
    foreign[6] = nn.Linear(64, 2)
    with pytest.raises(ValueError, match=r"6\.weight \(2, 64\)"):
        made.apply(foreign)
    with pytest.raises(ValueError, match="class is"):
        made.apply(nn.Linear(2, 2))
    assert "forward" not in vars(foreign[1])


def test_forward_replaced_later_blocks_removal(mlp_case):
    made = planned(mlp_case)
    made.apply(mlp_case.model)
    name = next(unit.name for unit in made.units if unit.option != "keep")
    module = mlp_case.model.get_submodule(name)
    ours = vars(module)["forward"]
    vars(module)["forward"] = lambda x: ours(x)
    with pytest.raises(RuntimeError, match=f"unit '{name}' was replaced"):
        made.remove(mlp_case.model)
    vars(module)["forward"] = ours
    made.remove(mlp_case.model)


def test_forward_replaced_earlier_stays_inside(mlp_case):
    calls = []
    for module in mlp_case.model[1:6]:
        plain = module.forward
        module.forward = lambda x, plain=plain: calls.append(1) or plain(x)
    before = [vars(module)["forward"] for module in mlp_case.model[1:6]]
    made = planned(mlp_case)
    made.apply(mlp_case.model)
    calls.clear()
    mlp_case.loss().backward()
    assert len(calls) == 5 + sum(unit.option != "keep" for unit in made.units)
    made.remove(mlp_case.model)
    assert [vars(module)["forward"] for module in mlp_case.model[1:6]] == before


def test_key_value_cache(gpt2_case):
    made = planned(gpt2_case)
    model, ids = gpt2_case.model, gpt2_case.batch["input_ids"]
    reference = gradients(gpt2_case, model)
    made.apply(model)
    torch.manual_seed(11)
    output = model(**gpt2_case.batch, use_cache=True)
    assert output.past_key_values is None
    output.loss.backward()
    assert_same_bits([param.grad for param in model.parameters()], reference[1 : 1 + len(list(model.parameters()))])
    model.eval()
    with torch.no_grad():
        first = model(ids[:, :32], use_cache=True)
        second = model(ids[:, 32:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(ids)
    torch.testing.assert_close(second.logits, whole.logits[:, 32:], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="DynamicCache"):
        model(ids[:, :32], past_key_values=type(first.past_key_values)(config=model.config))


def test_eval_without_gradients_recomputes_nothing():
    case = gpt2(dropout=0.0)
    made = planned(case)
    with torch.no_grad():
        before = case.loss()
        made.apply(case.model)
        assert torch.equal(case.loss(), before)
