"""TokenNormalizer: micro-batches of unequal length are one large batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import gradkern as gk
from gradkern.testing import same_bits

LENGTHS = (1, 4, 3)  # eight tokens: a power of two rounds nothing


def whole_numbers(*shape, seed, high=4):
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


class Exact(nn.Module):
    """A model all of whose sums are of small whole numbers: every order of adding gives the same bits."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.outer = nn.Linear(5, 3)
        for i, param in enumerate(self.parameters()):
            param.data.copy_(whole_numbers(*param.shape, seed=i, high=2))
        self.to(dtype)

    def token_losses(self, x):
        """Half squared outputs, one row a token."""
        return self.outer(self.inner(x)).square().sum(-1) / 2


def micro_batches(lengths=LENGTHS):
    return [whole_numbers(length, 6, seed=10 + i, high=3) for i, length in enumerate(lengths)]


def grads_of(model):
    return [p.grad for p in model.parameters()]


def all_same_bits(ours, theirs):
    return all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def large_batch(lengths=LENGTHS):
    model = Exact()
    model.token_losses(torch.cat(micro_batches(lengths))).mean().backward()
    return model


def stepped_on_the_large_batch(make_optimizer):
    model = large_batch()
    make_optimizer(model.parameters()).step()
    return model


OPTIMIZERS = {
    "ours": lambda params: gk.AdamW(params, lr=0.1, max_norm=2.0),
    "torch": lambda params: torch.optim.AdamW(params, lr=0.1),
    "torch fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.125),
}


def test_total_known_before():
    model = Exact()
    denominator = gk.TokenNormalizer.denominator(sum(LENGTHS))
    for x in micro_batches():
        (model.token_losses(x).sum() / denominator).backward()
    assert all_same_bits(grads_of(model), grads_of(large_batch()))
    assert denominator.dtype == torch.float32
    assert denominator.shape == ()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_total_known_at_the_end(name, tensor, reduction):
    model = Exact()
    opt = OPTIMIZERS[name](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    expected = stepped_on_the_large_batch(OPTIMIZERS[name])
    lengths = LENGTHS if reduction == "sum" else (1, 4, 2, 1)  # means over powers of two round nothing either
    if reduction == "mean":
        expected = large_batch(lengths)
        OPTIMIZERS[name](expected.parameters()).step()
    for x in micro_batches(lengths):
        losses = model.token_losses(x)
        tokens = torch.tensor(len(x)) if tensor else len(x)
        normalizer.loss(getattr(losses, reduction)(), tokens, reduction=reduction).backward()
    opt.step()
    assert all_same_bits(model.parameters(), expected.parameters())
    if name == "ours":
        assert same_bits(opt.grad_norm, gk.get_total_norm(grads_of(expected)))
        assert not hasattr(opt, "grad_scale")


def test_every_update_counts_anew():
    model, theirs = Exact(), Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    reference = OPTIMIZERS["ours"](theirs.parameters())
    normalizer = gk.TokenNormalizer(opt)
    for lengths in ((1, 7), (2, 2), (3, 10, 3)):
        for x in micro_batches(lengths):
            normalizer.loss(model.token_losses(x).sum(), len(x)).backward()
        (sum(theirs.token_losses(x).sum() for x in micro_batches(lengths)) / sum(lengths)).backward()
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            # After the first step the sums round, in one order here and in another there.
            assert torch.allclose(p.grad / sum(lengths), q.grad, rtol=1e-5, atol=1e-5)
            q.grad = p.grad / sum(lengths)
        opt.step()
        reference.step()
        assert all_same_bits(model.parameters(), theirs.parameters())
        opt.zero_grad()
        reference.zero_grad()


def test_ignored_labels_equal_the_large_batch_in_fp64_within_the_rounding_of_sums():
    """A table of logits, so that each token's own gradient has the same bits in any batch: only sums may differ.

    Two orders of adding n terms differ by at most 2 (n - 1) u sum |terms|, u = 2^-53; dividing adds one u on each side.
    """
    vocabulary = 7
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (6, 9), generator=generator)
    labels = torch.randint(vocabulary, (6, 9), generator=generator)
    for row, length in enumerate((9, 2, 5, 1, 7, 3)):
        labels[row, length:] = -100

    def gradient(rows, reduce):
        weight = table.clone().requires_grad_()
        for part in rows:
            logits = nn.functional.embedding(ids[part], weight)
            reduce(logits.flatten(0, 1), labels[part].flatten()).backward()
        return weight.grad

    total = (labels != -100).sum()
    denominator = gk.TokenNormalizer.denominator(total)
    micro = [[0], [1, 2], [3], [4, 5]]
    ours = gradient(micro, lambda *a: cross_entropy(*a, reduction="sum") / denominator)
    expected = gradient([list(range(6))], cross_entropy)
    means = gradient(micro, lambda *a: cross_entropy(*a) / len(micro))

    magnitudes = torch.zeros_like(table)
    for row, column in (labels != -100).nonzero().tolist():
        weight = table.clone().requires_grad_()
        cross_entropy(weight[ids[row, column]], labels[row, column]).backward()
        magnitudes += weight.grad.abs() / total
    bound = 2.0**-53 * (2 * (int(total) - 1) + 2) * magnitudes
    assert ((ours - expected).abs() <= bound).all()
    assert (means - expected).norm() > 0.1 * expected.norm(), "the mean of means is another gradient"


def test_a_transformers_model_in_padded_micro_batches():
    transformers = pytest.importorskip("transformers", reason="the test is of its num_items_in_batch")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    lengths = (3, 16, 2, 9)
    ids = torch.randint(50, (4, 16))
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)

    def backward(row, count=None, wrap=lambda loss, tokens: loss):
        length = lengths[row]
        loss = model(
            input_ids=ids[row : row + 1, :length], labels=labels[row : row + 1, :length], num_items_in_batch=count
        ).loss
        wrap(loss, (labels[row, 1:] != -100).sum()).backward()

    def gradient():
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return grads

    total = (labels[:, 1:] != -100).sum()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = gradient()
    for row in range(4):
        backward(row, gk.TokenNormalizer.denominator(total))
    known = gradient()
    normalizer = gk.TokenNormalizer(torch.optim.SGD(model.parameters(), lr=0.0))
    for row in range(4):
        backward(row, wrap=lambda loss, tokens: normalizer.loss(loss, tokens, reduction="mean"))
    normalizer.rescale_()
    streamed = gradient()
    for row in range(4):
        backward(row)
    means = gradient() / 4
    for ours in (known, streamed):
        assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert (means - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_a_grad_scaler(name, unscale):
    model = Exact()
    opt = OPTIMIZERS[name](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x in micro_batches():
        scaler.scale(normalizer.loss(model.token_losses(x).sum(), len(x))).backward()
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    expected = stepped_on_the_large_batch(OPTIMIZERS[name])
    assert all_same_bits(model.parameters(), expected.parameters())
    if name == "ours":
        assert same_bits(opt.grad_norm, gk.get_total_norm(grads_of(expected)))
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


def test_norms_folded_in_backward_are_not_trusted_after_unscale():
    """Large enough to be folded, so that a stale norm would be used if anything made the optimizer trust it."""
    model = nn.Linear(600, 600, bias=False)
    model.weight.data.copy_(whole_numbers(600, 600, seed=0))
    opt = gk.AdamW(model.parameters(), max_norm=float("inf"))
    normalizer = gk.TokenNormalizer(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for length in (3, 5):
        x = whole_numbers(length, 600, seed=length)
        scaler.scale(normalizer.loss(model(x).sum(), length)).backward()
    scaler.unscale_(opt)
    expected = gk.get_total_norm([model.weight.grad / 8])
    scaler.step(opt)
    assert same_bits(opt.grad_norm, expected)


@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_the_scaler_skips_is_not_counted_with_the_next(name, zero_first):
    model = Exact()
    opt = OPTIMIZERS[name](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(normalizer.loss(model.token_losses(micro_batches()[0]).sum() * float("inf"), 1)).backward()
    scaler.step(opt)
    scaler.update()
    assert all_same_bits(model.parameters(), Exact().parameters())
    if zero_first:
        opt.zero_grad()
    losses = [normalizer.loss(model.token_losses(x).sum(), len(x)) for x in micro_batches()]
    opt.zero_grad()
    for loss in losses:
        scaler.scale(loss).backward()
    scaler.step(opt)
    assert all_same_bits(model.parameters(), stepped_on_the_large_batch(OPTIMIZERS[name]).parameters())


def test_only_losses_that_went_backward_are_counted():
    model = Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    first, second, third = micro_batches()
    normalizer.loss(model.token_losses(second).sum(), 100)  # thought better of
    with torch.no_grad():
        normalizer.loss(model.token_losses(second).sum(), 100)
    together = [normalizer.loss(model.token_losses(x).sum(), len(x)) for x in (first, second)]
    sum(together).backward()
    normalizer.loss(model.token_losses(third).sum(), len(third)).backward()
    opt.step()
    assert all_same_bits(model.parameters(), stepped_on_the_large_batch(OPTIMIZERS["ours"]).parameters())


def test_clipping_by_hand_after_rescaling():
    model = Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    batches = micro_batches()
    for x in batches:
        normalizer.loss(model.token_losses(x).sum(), len(x)).backward()
    normalizer.rescale_()
    expected = large_batch()
    assert all_same_bits(grads_of(model), grads_of(expected))
    with pytest.raises(RuntimeError, match=r"divided by rescale_\(\) already"):
        normalizer.loss(model.token_losses(batches[0]).sum(), 1).backward()
    assert all_same_bits(grads_of(model), grads_of(expected))
    for m in (model, expected):
        gk.clip_grad_norm_(m.parameters(), 0.5)
    opt.step()
    OPTIMIZERS["ours"](expected.parameters()).step()
    assert all_same_bits(model.parameters(), expected.parameters())


def test_low_precision_gradients_are_divided_by_an_unrounded_total():
    param = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    normalizer = gk.TokenNormalizer(torch.optim.SGD([param]))
    values = torch.linspace(500, 3000, 50)
    normalizer.loss((param.float() * values).sum(), 1003).backward()
    summed = param.grad.clone()
    normalizer.rescale_()
    assert same_bits(param.grad, (summed.float() / 1003).bfloat16())


def test_with_an_accumulator_in_fp32():
    model = Exact(torch.bfloat16)
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    normalizer = gk.TokenNormalizer(torch.optim.SGD(params, lr=0.0))
    for x in micro_batches():
        normalizer.loss(model.token_losses(x.bfloat16()).float().sum(), len(x)).backward()
    sums = [p.grad.clone() for p in params]
    assert accumulator.norm() > 0
    normalizer.rescale_()
    assert all(same_bits(p.grad, s / 8) for p, s in zip(params, sums, strict=True))
    assert same_bits(accumulator.norm(), gk.get_total_norm([s / 8 for s in sums]))


def test_gradients_zeroed_in_place_without_a_step_need_reset():
    model = Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    normalizer.loss(model.token_losses(micro_batches()[0]).sum(), 1).backward()
    opt.zero_grad(set_to_none=False)
    normalizer.reset()
    for x in micro_batches():
        normalizer.loss(model.token_losses(x).sum(), len(x)).backward()
    opt.step()
    assert all_same_bits(model.parameters(), stepped_on_the_large_batch(OPTIMIZERS["ours"]).parameters())


def test_no_token_at_all_changes_nothing_by_dividing():
    assert gk.TokenNormalizer.denominator(0) == 1
    model = Exact()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    normalizer = gk.TokenNormalizer(opt)
    normalizer.loss(model.token_losses(torch.zeros(0, 6)).sum(), 0).backward()
    opt.step()
    assert all_same_bits(model.parameters(), Exact().parameters())


def test_a_step_that_raises_leaves_no_scale_behind():
    model = Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    normalizer = gk.TokenNormalizer(opt)
    for x in micro_batches():
        normalizer.loss(model.token_losses(x).sum(), len(x)).backward()
    good, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], None
    with pytest.raises(TypeError):
        opt.step()
    opt.param_groups[0]["lr"] = good
    opt.step()
    expected = stepped_on_the_large_batch(OPTIMIZERS["ours"])
    assert same_bits(opt.grad_norm, gk.get_total_norm(grads_of(expected)))
    assert not hasattr(opt, "grad_scale")


def test_a_scale_that_the_user_has_set_is_multiplied_and_given_back():
    model = Exact()
    opt = OPTIMIZERS["ours"](model.parameters())
    opt.grad_scale = torch.tensor(4.0)
    normalizer = gk.TokenNormalizer(opt)
    for x in micro_batches():
        normalizer.loss(4.0 * model.token_losses(x).sum(), len(x)).backward()
    opt.step()
    assert all_same_bits(model.parameters(), stepped_on_the_large_batch(OPTIMIZERS["ours"]).parameters())
    assert opt.grad_scale == 4.0


def test_detach_and_what_is_kept_alive():
    model = Exact()
    opt = torch.optim.SGD(model.parameters(), lr=0.125)
    normalizer = gk.TokenNormalizer(opt)
    normalizer.detach()
    model.token_losses(torch.cat(micro_batches())).mean().backward()
    opt.step()
    assert all_same_bits(model.parameters(), stepped_on_the_large_batch(OPTIMIZERS["sgd"]).parameters())
    gk.TokenNormalizer(opt)
    alive = weakref.ref(opt)
    del opt, normalizer
    gc.collect()
    assert alive() is None


def test_bad_arguments():
    model = Exact()
    normalizer = gk.TokenNormalizer(opt := torch.optim.SGD(model.parameters()))
    loss = model.token_losses(micro_batches()[0]).sum()
    with pytest.raises(ValueError, match="'sum' or 'mean', got 'none'"):
        normalizer.loss(loss, 1, reduction="none")
    with pytest.raises(ValueError, match=r"tokens has shape \(2,\)"):
        normalizer.loss(loss, torch.ones(2))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        normalizer.loss(loss, -1)
    for step in (lambda: opt.step(lambda: loss), lambda: opt.step(closure=lambda: loss)):
        with pytest.raises(RuntimeError, match="closure"):
            step()
    opt.step(None)


def train_two_ways(rank):
    """Five micro-batches of unequal length on two processes: two here, three there."""
    batches = micro_batches((1, 7, 3, 2, 3))
    mine = batches[:2] if rank == 0 else batches[2:]
    tokens = sum(map(len, mine))
    results = {}
    for way in ("known", "streaming", "rescaled"):
        model = Exact()
        opt = OPTIMIZERS["ours"](model.parameters())
        ddp = DistributedDataParallel(model)
        normalizer = gk.TokenNormalizer(opt) if way != "known" else None
        denominator = gk.TokenNormalizer.denominator(tokens) if way == "known" else None
        ddp.module.forward = model.token_losses
        for k, x in enumerate(mine):
            with ddp.no_sync() if k < len(mine) - 1 else torch.enable_grad():
                loss = ddp(x).sum()
                (loss / denominator if normalizer is None else normalizer.loss(loss, len(x))).backward()
        if way == "rescaled":
            normalizer.rescale_()
        opt.step()
        results[way] = [p.detach() for p in model.parameters()]
        results[f"{way} norm"] = [opt.grad_norm]
    return results


def test_two_processes_equal_one_large_batch(tmp_path):
    expected = large_batch((1, 7, 3, 2, 3))
    opt = OPTIMIZERS["ours"](expected.parameters())
    opt.step()
    for results in in_two_processes(train_two_ways, tmp_path):
        for way in ("known", "streaming", "rescaled"):
            assert all_same_bits(results[way], expected.parameters()), way
            assert all_same_bits(results[f"{way} norm"], [opt.grad_norm]), way
