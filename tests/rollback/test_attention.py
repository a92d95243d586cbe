"""Attention modules of torch: the bits of their own training, and every sample's gradient of the packed projection."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._reading import read_segments

SAMPLES, LENGTH, WIDTH = 3, 5, 8


class Attends(nn.Module):
    """Attention over projected inputs of one, two or three sources."""

    def __init__(self, sources=1, recompute=False, **options):
        super().__init__()
        self.sources, self.recompute = sources, recompute
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        self.call = {}

    def forward(self, x):
        x = torch.tanh(x)
        first = x if self.attention.batch_first else x.transpose(0, 1)
        second = first.flip(1 if self.attention.batch_first else 0)[...]
        keys = first if self.sources == 1 else second
        values = keys if self.sources < 3 else 2 * second
        if self.attention.vdim != WIDTH:
            values = values[..., : self.attention.vdim]
        output, weights = self.attention(first, keys, values, **self.call)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output if weights is None else output + weights.flatten(1).sum(1)[:, None, None]


def padding():
    mask = torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


CASES = {
    "self": ({}, {}),
    "self, time first": ({"batch_first": False}, {}),
    "self, weights not asked for": ({}, {"need_weights": False}),
    "self, causal": ({}, {"need_weights": False, "is_causal": True, "attn_mask": "causal"}),
    "self, masked": ({"batch_first": False}, {"key_padding_mask": "padding", "attn_mask": "causal, bool"}),
    "no bias, zero attention": ({"bias": False, "add_zero_attn": True}, {}),
    "two sources": ({"sources": 2}, {"need_weights": False}),
    "two sources, time first": ({"sources": 2, "batch_first": False}, {}),
    "three sources": ({"sources": 3}, {}),
    "three sources of two widths": ({"sources": 3, "vdim": 6}, {"need_weights": False}),
}


IN_BF16 = ["self", "self, time first", "self, causal", "two sources", "three sources of two widths"]


@pytest.mark.parametrize(
    ("name", "low"), [(name, None) for name in CASES] + [(name, torch.bfloat16) for name in IN_BF16]
)
def test_gradients_have_the_bits_of_torch_and_split_into_samples(name, low, tmp_path):
    options, call = CASES[name]
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    masks = {"padding": padding(), "causal": causal, "causal, bool": causal < 0}
    torch.manual_seed(0)
    plain = Attends(**{"batch_first": True, **options})
    plain.call = {key: masks.get(value, value) if isinstance(value, str) else value for key, value in call.items()}
    for parameter in plain.parameters():
        parameter.data.normal_()
    recorded, values = copy.deepcopy(plain), torch.randn(SAMPLES, LENGTH, WIDTH)

    def loss_of(model, x):
        with contextlib.nullcontext() if low is None else torch.autocast("cpu", low):
            return (model(x) - 1).float().square().sum()

    loss_of(plain, values).backward()
    optimizer = gk.SGD(recorded.parameters(), lr=0.0)
    with gk.rollback.record(recorded, optimizer, tmp_path / "run", rank=64) as recorder:
        with recorder.batch(range(SAMPLES)):
            loss_of(recorded, values).backward()
        for (name, ours), theirs in zip(recorded.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
        optimizer.step()
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.conservation(recorded).unowned_share == 0
    layout = ledger._store.layout
    (segment,) = read_segments(ledger._store, backwards=True)
    wide = copy.deepcopy(plain).double()
    wide.call = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in plain.call.items()
    }
    for sample in range(SAMPLES):
        if "key_padding_mask" in plain.call:
            wide.call["key_padding_mask"] = padding()[sample : sample + 1]
        loss = (wide(values[sample : sample + 1].double()) - 1).square().sum()
        expected = dict(zip(plain.state_dict(), torch.autograd.grad(loss, list(wide.parameters())), strict=True))
        found = {name: torch.zeros(1, *each.shape) for name, each in expected.items()}
        for stream, record in segment.records.items():
            own = (record.visit % SAMPLES == sample).float()[None]
            record.add_to(found[layout.parameters[layout.streams[stream].parameter].name], own)
        scale = max(each.norm() for each in expected.values())
        for name, each in expected.items():
            # The gradient of the keys' bias is zero but for rounding.
            assert (found[name][0] - each).norm() <= (0.02 if low is None else 0.06) * each.norm() + 1e-6 * scale, name


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Decodes(nn.Module):
    """An encoder and a decoder over the same inputs, or an encoder alone, and an output."""

    def __init__(self, decoder):
        super().__init__()
        self.encoder = encoder(batch_first=not decoder)
        if decoder:
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16), 1)
        self.head, self.has_decoder = nn.Linear(WIDTH, 4), decoder

    def forward(self, x):
        if not self.has_decoder:
            return self.head(self.encoder(x).mean(1))
        x = x.transpose(0, 1)
        return self.head(self.decoder(x, self.encoder(x)).mean(0))


def test_samples_are_told_apart_where_time_comes_first_and_is_as_long(tmp_path):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(block, 1, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    values, weights = torch.randn(4, 4, WIDTH), torch.randn(4, 1, WIDTH)  # a norm's outputs have a constant length
    optimizer = gk.SGD(model.parameters(), lr=0.0)
    with gk.rollback.record(model, optimizer, tmp_path / "run", rank=64) as recorder:
        with recorder.batch(range(4)):
            (model(values) * weights).sum().backward()
        optimizer.step()
    (segment,) = read_segments(gk.rollback.open(tmp_path / "run")._store, backwards=True)
    layout, wide = gk.rollback.open(tmp_path / "run")._store.layout, copy.deepcopy(model).double()
    for sample in range(4):
        loss = (wide(values[:, sample : sample + 1].double()) * weights).sum()
        expected = dict(zip(model.state_dict(), torch.autograd.grad(loss, list(wide.parameters())), strict=True))
        for stream, record in segment.records.items():
            each = expected[layout.parameters[layout.streams[stream].parameter].name]
            found = torch.zeros(1, *each.shape)
            record.add_to(found, (record.visit == sample).float()[None])
            assert (found[0] - each).norm() <= 0.02 * each.norm()


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder, time first"])
def test_a_transformer_of_torch_obeys_the_law_and_keeps_its_bits(decoder, tmp_path):
    torch.manual_seed(0)
    plain = Decodes(decoder)
    recorded = copy.deepcopy(plain)
    inputs, labels = torch.randn(40, LENGTH, WIDTH), torch.randint(0, 4, (40,))

    def train(model, optimizer, batch):
        torch.manual_seed(1)
        for step in range(12):
            for micro in range(4):
                rows = torch.arange(SAMPLES * (4 * step + micro), SAMPLES * (4 * step + micro + 1)) % 40
                with batch(rows):
                    (F.cross_entropy(model(inputs[rows]), labels[rows]) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(plain, gk.AdamW(plain.parameters(), max_norm=0.5), lambda rows: contextlib.nullcontext())
    optimizer = gk.AdamW(recorded.parameters(), max_norm=0.5)
    with gk.rollback.record(recorded, optimizer, tmp_path / "run") as recorder:
        train(recorded, optimizer, recorder.batch)
    for (name, ours), theirs in zip(recorded.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.conservation(recorded).unowned_share == 0
    report = ledger.verify(recorded)
    assert report.passed, str(report)
    scores = ledger.scores(recorded.eval(), inputs[:1], loss_fn=lambda output, _: F.cross_entropy(output, labels[:1]))
    assert torch.isfinite(scores.scores).all()


def test_what_of_attention_cannot_be_recorded_is_refused_by_name(tmp_path):
    model = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True)
    with pytest.raises(ValueError, match=r"'bias_k', 'bias_v'.*without add_bias_kv"):
        gk.rollback.record(model, gk.AdamW(model.parameters()), tmp_path / "refused")
    model, x = nn.MultiheadAttention(WIDTH, 2), torch.randn(LENGTH, WIDTH)
    refused = pytest.raises(LedgerError, match=r"query of shape \(5, 8\).*unsqueeze\(1\)")
    with gk.rollback.record(model, gk.AdamW(model.parameters()), tmp_path / "run"), refused:
        model(x, x, x)


def test_only_what_is_trained_of_an_attention_is_recorded(tmp_path):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    model.in_proj_weight.requires_grad_(False)
    model.out_proj.bias.requires_grad_(False)
    optimizer, x = gk.AdamW([each for each in model.parameters() if each.requires_grad]), torch.randn(3, LENGTH, WIDTH)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(range(3)):
            model(x, x, x)[0].square().sum().backward()
        optimizer.step()
    assert gk.rollback.open(tmp_path / "run").verify(model).passed
