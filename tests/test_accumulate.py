"""GradAccumulator: fp32 gradients whatever the parameters, any optimizer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern.grad_fold import known_partials
from gradkern.testing import same_bits


def tiny(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 2)).to(dtype)


def loss_of(model, seed):
    dtype = model[0].weight.dtype
    return model(torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)).float().square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_accumulate_in_fp32(dtype):
    model = tiny(dtype)
    params = list(model.parameters())
    each = [torch.autograd.grad(loss_of(model, k), params) for k in range(16)]
    accumulator = gk.GradAccumulator(params)
    for k in range(16):
        loss_of(model, k).backward()
    for i, p in enumerate(params):
        expected = torch.zeros(p.shape)
        for grads in each:
            expected = expected + grads[i].float()
        assert p.grad.dtype == torch.float32
        assert same_bits(p.grad, expected)
    truth = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
    assert accumulator.norm().item() == pytest.approx(truth.item(), rel=1e-7)


def test_first_micro_batch_overwrites_and_keeps_what_the_user_holds():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    kept = model[0].weight.grad
    copy = kept.clone()
    view = model[2].weight.grad.detach()[:1]
    view_copy = view.clone()
    accumulator.zero_grad()
    loss_of(model, 1).backward()
    assert same_bits(kept, copy)
    assert same_bits(view, view_copy)
    fresh = tiny(torch.bfloat16)
    grads = torch.autograd.grad(loss_of(fresh, 1), list(fresh.parameters()))
    assert all(same_bits(p.grad, g.float()) for p, g in zip(model.parameters(), grads, strict=True))
    address = model[2].bias.grad.data_ptr()
    accumulator.zero_grad()
    loss_of(model, 2).backward()
    assert model[2].bias.grad.data_ptr() == address, "a buffer that nobody else sees is used again"


def test_a_gradient_that_a_graph_has_saved_is_not_overwritten():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    factor = torch.ones((), requires_grad=True)
    expected = model[0].weight.grad.sum()
    penalty = (model[0].weight.grad * factor).sum()  # keeps the gradient for its backward
    accumulator.zero_grad()
    loss_of(model, 1).backward()
    penalty.backward()
    assert torch.allclose(factor.grad, expected)


def test_a_gradient_given_other_memory_is_not_used_again():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    old = model[0].weight.grad.detach()
    pool = torch.frombuffer(bytearray(4 * 60 * 40), dtype=torch.float32)
    model[0].weight.grad.data = pool.view(60, 40)
    accumulator.zero_grad()
    loss_of(model, 1).backward()
    assert torch.equal(pool, torch.zeros(60 * 40))
    assert old.any()


def test_a_gradient_lent_to_another_parameter_is_not_used_again():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    borrower = nn.Parameter(torch.zeros(60, 40))
    borrower.grad = model[0].weight.grad
    expected = borrower.grad.clone()
    accumulator.zero_grad()
    loss_of(model, 1).backward()
    assert same_bits(borrower.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_requires_grad_is_added_to_as_in_torch(dtype):
    shown = []
    for ours in (True, False):
        model = tiny()
        keep = gk.GradAccumulator(model.parameters()) if ours else None
        grad = torch.ones(60, 40, dtype=dtype, requires_grad=True)
        model[0].weight.grad_dtype = None
        model[0].weight.grad = grad
        loss_of(model, 1).backward()
        shown.append((model[0].weight.grad, model[0].weight.grad is grad, model[0].weight.grad.requires_grad))
        del keep
    assert same_bits(shown[0][0], shown[1][0])
    assert shown[0][1:] == shown[1][1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_torch_optimizer(dtype):
    model, plain = tiny(dtype), tiny(dtype)
    accumulator = gk.GradAccumulator(model.parameters())
    opt, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    for step in range(3):
        for k in range(4):
            (loss_of(model, 4 * step + k) / 4).backward()
            (loss_of(plain, 4 * step + k) / 4).backward()
        norm = accumulator.clip_grad_norm_(0.05)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 2e-2)
        accumulator.cast_grads_()
        assert all(p.grad.dtype == dtype for p in model.parameters())
        opt.step()
        reference.step()
        accumulator.zero_grad()
        reference.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        # bf16: autograd accumulates in bf16, so that a few weights near zero land one rounding step of lr * grad apart.
        assert torch.allclose(
            p, q, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-7 if dtype == torch.float32 else 1e-3
        )


def test_explicit_gradients():
    model = tiny()
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    first = [torch.randn_like(p) for p in params]
    second = [torch.randn_like(p).bfloat16() for p in params]
    accumulator.accumulate_([*first[:-1], None])
    assert params[-1].grad is None
    accumulator.accumulate_(second)
    for p, a, b in zip(params[:-1], first, second, strict=False):
        assert same_bits(p.grad, a + b.float())
    assert same_bits(params[-1].grad, second[-1].float())
    with pytest.raises(ValueError, match="got 1 gradients, expected 4"):
        accumulator.accumulate_([None])


def test_detach_gives_autograd_its_gradients_back():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    accumulator.detach()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    loss_of(model, 1).backward()
    torch.optim.AdamW(model.parameters()).step()


def test_bad_parameters():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        gk.GradAccumulator([frozen])
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        gk.GradAccumulator([])
    with pytest.raises(ValueError, match=r"params\[1\] has dtype torch\.float64"):
        gk.GradAccumulator([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))])
    narrow = nn.Parameter(torch.ones(2))
    narrow.grad_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"params\[0\] has grad_dtype torch\.bfloat16, expected None"):
        gk.GradAccumulator([narrow])


def test_norm_of_a_folded_list_reaches_the_optimizer_and_edits_are_seen():
    model = tiny()
    params = list(model.parameters())
    opt = gk.AdamW(params, max_norm=1.0)
    opt.detach()
    accumulator = gk.GradAccumulator(params)
    for seed in range(3):
        accumulator.accumulate_([torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params])
    expected = gk.get_total_norm([p.grad for p in params])
    assert known_partials([p.grad for p in params]) is not None
    assert same_bits(accumulator.norm(), expected)
    opt.step()
    assert same_bits(opt.grad_norm, expected)

    params[1].grad.mul_(2.0)
    assert known_partials([p.grad for p in params]) is None
    params[1].grad = torch.ones_like(params[1])
    expected = gk.get_total_norm([p.grad for p in params])
    opt.step()
    assert same_bits(opt.grad_norm, expected)
    assert same_bits(accumulator.norm(), expected)
    assert known_partials([p.grad for p in params][:-1]) is None
    assert known_partials([]) is None


def test_accumulating_on_after_cast_grads_widens_again():
    model = tiny(torch.bfloat16)
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    loss_of(model, 0).backward()
    accumulator.cast_grads_()
    before = [p.grad.float() for p in params]
    more = [torch.ones_like(p) for p in params]
    accumulator.accumulate_(more)
    for p, b, m in zip(params, before, more, strict=True):
        assert same_bits(p.grad, b + m.float())


def test_clipping_after_unscale_reads_the_gradients_again():
    model = tiny()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = gk.GradAccumulator(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):
        scaler.scale(loss_of(model, k)).backward()
    scaler.unscale_(opt)
    truth = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert accumulator.clip_grad_norm_(1e9).item() == pytest.approx(truth, rel=1e-6)


def test_a_bad_gradient_is_refused_before_any_is_folded():
    model = tiny()
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    good = [torch.ones_like(p) for p in params]
    with pytest.raises(ValueError, match=r"gradient 1 is torch\.float32 of shape \(3,\)"):
        accumulator.accumulate_([good[0], torch.ones(3), *good[2:]])
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("also", [True, False])
def test_strides_of_dimensions_of_size_one_do_not_matter(also):
    p, q = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(3))
    accumulator = gk.GradAccumulator([p, q])
    p.grad, q.grad = torch.zeros(4).as_strided((4, 1), (1, 4)), torch.zeros(3)
    accumulator.accumulate_([torch.ones(4, 1), torch.ones(3) if also else None])
    assert torch.equal(p.grad, torch.ones(4, 1))


def test_a_gradient_shown_in_another_layout_is_refused_before_any_is_folded():
    p, q = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    accumulator = gk.GradAccumulator([p, q])
    p.grad, q.grad = torch.zeros(4, 4), torch.zeros(4, 4).t()
    with pytest.raises(ValueError, match=r"gradient 1 .* the p\.grad that it is added to has shape \(4, 4\), stride"):
        accumulator.accumulate_([torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bfloat16)])
    assert not p.grad.any()


# --- what the user has set, and what is freed -----------------------------------------------------------------------


def fp32_sums(model, seeds):
    """The gradients of some micro-batches, added in fp32."""
    params = list(model.parameters())
    sums = [torch.zeros(p.shape) for p in params]
    for seed in seeds:
        sums = [s + g.float() for s, g in zip(sums, torch.autograd.grad(loss_of(model, seed), params), strict=True)]
    return sums


def shows(model, expected):
    return all(same_bits(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_dtype_set_by_the_user_is_respected(dtype):
    model = tiny(dtype)
    for param in model.parameters():
        param.grad_dtype = torch.float32
    accumulator = gk.GradAccumulator(model.parameters())
    expected = fp32_sums(model, range(4))
    for seed in range(4):
        loss_of(model, seed).backward()
    assert shows(model, expected)
    accumulator.cast_grads_()
    assert shows(model, expected), "float32 is what the user asked for"
    accumulator.detach()
    assert shows(model, expected)
    assert all(p.grad_dtype == torch.float32 for p in model.parameters())
    loss_of(model, 4).backward()
    assert shows(model, fp32_sums(model, range(5)))


def test_detach_restores_every_grad_dtype_and_hook():
    model, plain = tiny(torch.bfloat16), tiny(torch.bfloat16)
    model[0].bias.grad_dtype = None
    gk.GradAccumulator(model.parameters()).detach()
    assert model[0].bias.grad_dtype is None
    assert all(p.grad_dtype == torch.bfloat16 for p in model.parameters() if p is not model[0].bias)
    for m in (model, plain):
        for seed in range(3):
            loss_of(m, seed).backward()
    assert shows(model, [p.grad for p in plain.parameters()])


def test_backward_goes_on_in_fp32_after_cast_grads():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    accumulator.cast_grads_()
    held = model[0].weight.grad
    copy = held.clone()
    loss_of(model, 1).backward()
    (more,) = torch.autograd.grad(loss_of(model, 1), [model[0].weight])
    assert same_bits(model[0].weight.grad, copy.float() + more.float())
    assert same_bits(held, copy)


def deep(dtype, layers=8, width=256):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(dtype)


def deep_loss(model):
    return model(torch.ones(2, 256, dtype=model[0].weight.dtype)).float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_batch_gradient_does_not_outlive_its_fold(dtype):
    model = deep(dtype)
    fresh = []
    alive = []

    def watch(grads):
        alive.append(sum(ref() is not None for ref in fresh))
        fresh.append(weakref.ref(grads[0]))

    nodes = [get_gradient_edge(p).node for p in model.parameters()]
    for node in nodes:
        node.register_prehook(watch)
    accumulator = gk.GradAccumulator(model.parameters())
    for _ in range(3):
        deep_loss(model).backward()
    assert alive == [0] * (3 * len(nodes))
    assert len(accumulator.grads) == len(nodes)


def test_peak_of_backward_holds_one_low_precision_gradient_at_a_time():
    transients = []
    for layers in (4, 16):
        model = deep(torch.bfloat16, layers)
        one = model[0].weight.nbytes
        accumulator = gk.GradAccumulator(model.parameters(), measure=True)
        deep_loss(model).backward()
        measured = gk.checkpoint.measure_peak(lambda model=model: deep_loss(model).backward(), model=model)
        transients.append(measured.peak_bytes - measured.start_bytes)
        assert accumulator.peak_grad_bytes == layers * 2 * one + one
    assert abs(transients[1] - transients[0]) < one / 4, "a deeper model needs no more; activations here are tiny"


def test_peak_grad_bytes_counts_what_is_there():
    model = deep(torch.float32)
    one = model[0].weight.nbytes
    accumulator = gk.GradAccumulator(model.parameters(), measure=True)
    assert accumulator.peak_grad_bytes == 0
    deep_loss(model).backward()
    assert accumulator.peak_grad_bytes == 8 * one, "autograd's own tensors, taken without a copy"
    deep_loss(model).backward()
    assert accumulator.peak_grad_bytes == 9 * one
    for _ in range(2):
        accumulator.zero_grad()
        deep_loss(model).backward()
        deep_loss(model).backward()
    assert accumulator.peak_grad_bytes == 9 * one

    once = deep(torch.float32)
    accumulator = gk.GradAccumulator(once.parameters(), measure=True)
    deep_loss(once).backward()
    accumulator.zero_grad()
    assert accumulator.peak_grad_bytes == 8 * one, "also where nobody looked while they were there"

    other = deep(torch.float32)
    greedy = []
    node = get_gradient_edge(other[7].weight).node
    node.register_prehook(lambda grads: greedy.append(grads[0]))
    accumulator = gk.GradAccumulator(other.parameters(), measure=True)
    deep_loss(other).backward()
    deep_loss(other).backward()
    assert accumulator.peak_grad_bytes == 11 * one, "two that someone keeps, and the one just folded"


def test_buffers_kept_after_zero_grad_are_counted():
    model = deep(torch.bfloat16, layers=1)
    accumulator = gk.GradAccumulator(model.parameters(), measure=True)
    deep_loss(model).backward()
    held = model[0].weight.grad
    accumulator.zero_grad()
    deep_loss(model).backward()
    assert held is not model[0].weight.grad
    assert accumulator.peak_grad_bytes == (4 + 2) * 256 * 256, "what the user keeps is the user's"


def test_a_peak_that_was_not_measured_is_not_made_up():
    with pytest.raises(RuntimeError, match="measure=True"):
        _ = gk.GradAccumulator(tiny().parameters()).peak_grad_bytes


# --- corners --------------------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def accumulated(dtype):
    """A model with two micro-batches behind it, its accumulator, and what it shows."""
    model = tiny(dtype)
    accumulator = gk.GradAccumulator(model.parameters())
    for seed in range(2):
        loss_of(model, seed).backward()
    return model, accumulator, fp32_sums(model, range(2))


@DTYPES
def test_autograd_grad_leaves_gradients_alone(dtype):
    model, accumulator, expected = accumulated(dtype)
    norm = accumulator.norm()
    torch.autograd.grad(loss_of(model, 5), list(model.parameters()))
    assert shows(model, expected)
    assert same_bits(accumulator.norm(), norm)


@DTYPES
def test_backward_of_some_parameters_only(dtype):
    model, _, expected = accumulated(dtype)
    loss_of(model, 2).backward(inputs=[model[0].weight])
    assert shows(model, [fp32_sums(model, range(3))[0], *expected[1:]])


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("midway")


@DTYPES
def test_backward_that_raises_midway_changes_only_what_it_has_reached(dtype):
    model, accumulator, expected = accumulated(dtype)
    seen = [p.grad for p in model.parameters()]
    hidden = model[1](model[0](torch.ones(8, 40, dtype=dtype)))
    with pytest.raises(ArithmeticError, match="midway"):
        model[2](Fail.apply(hidden)).float().square().mean().backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), seen, strict=True))
    assert all(same_bits(p.grad, e) for p, e in zip(model[0].parameters(), expected[:2], strict=True))
    assert same_bits(accumulator.norm(), gk.get_total_norm(accumulator.grads))
    before = [p.grad.clone() for p in model.parameters()]
    more = torch.autograd.grad(loss_of(model, 3), list(model.parameters()))
    loss_of(model, 3).backward()
    assert shows(model, [b + g.float() for b, g in zip(before, more, strict=True)])


@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
@DTYPES
def test_a_gradient_with_a_graph_takes_torchs_path(dtype):
    model, accumulator, expected = accumulated(dtype)
    loss_of(model, 2).backward(create_graph=True)
    expected = fp32_sums(model, range(3))
    assert all(p.grad.requires_grad for p in model.parameters())
    assert shows(model, expected)
    assert same_bits(accumulator.norm(), gk.get_total_norm([p.grad.detach() for p in model.parameters()]))
    (second,) = torch.autograd.grad(model[0].weight.grad.square().sum(), [model[0].weight])
    assert second.abs().sum() > 0
    accumulator.zero_grad()
    loss_of(model, 0).backward()
    assert shows(model, fp32_sums(model, [0]))


@DTYPES
@pytest.mark.parametrize("how", ["mul_", "replace", "fresh view"])
def test_edits_are_noticed(dtype, how):
    model, accumulator, _ = accumulated(dtype)
    weight = model[0].weight
    if how == "mul_":
        weight.grad.mul_(3.0)
    elif how == "replace":
        weight.grad = torch.ones_like(weight.grad)
    else:
        weight.grad.view(-1)[:7] = 5.0
    assert same_bits(accumulator.norm(), gk.get_total_norm(accumulator.grads))


def test_parameters_converted_afterwards_are_refused_instead_of_losing_their_fold():
    model = tiny()
    accumulator = gk.GradAccumulator(model.parameters())
    model.bfloat16()
    loss_of(model, 0).backward()
    for use in (accumulator.norm, lambda: accumulator.clip_grad_norm_(1.0), accumulator.zero_grad):
        with pytest.raises(RuntimeError, match=r"got torch\.bfloat16 on cpu, expected torch\.float32"):
            use()


@DTYPES
def test_tied_and_recomputed_layers(dtype):
    layer = nn.Linear(40, 40).to(dtype)
    accumulator = gk.GradAccumulator(layer.parameters())
    plain = nn.Linear(40, 40).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [torch.zeros(p.shape) for p in plain.parameters()]
    for _ in range(3):
        checkpoint(lambda y: layer(layer(y)), x, use_reentrant=False).float().sum().backward()
        grads = torch.autograd.grad(plain(plain(x)).float().sum(), list(plain.parameters()))
        expected = [e + g.float() for e, g in zip(expected, grads, strict=True)]
    assert shows(layer, expected)
    assert same_bits(accumulator.norm(), gk.get_total_norm(accumulator.grads))


@DTYPES
def test_what_is_dropped_is_freed(dtype):
    model, accumulator, _ = accumulated(dtype)
    refs = [weakref.ref(accumulator), weakref.ref(accumulator._fold)]
    del accumulator
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    gk.GradAccumulator(model.parameters())
    ref = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert ref() is None
