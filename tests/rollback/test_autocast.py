"""Recording under autocast: torch's own bits, every skipped step left out, and a law as tight as in fp32."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from recorded_models import TokenModel, gpt2, llama, token_data, token_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._reading import read_segments


def linear(inputs, outputs, *, frozen=(), bias=True):
    module = nn.Linear(inputs, outputs, bias=bias)
    for name in frozen:
        getattr(module, name).requires_grad_(False)
    return module


def conv1d(outputs, inputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


def llama_norm(width):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(width)


class Transposed(nn.Module):
    """Gives a Linear an input that is not contiguous, for which torch adds the bias by itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2).contiguous().transpose(1, 2))


# What is between two Linear layers, so that inputs are of low precision and get gradients.
LAYERS = {
    "linear": (lambda: linear(6, 7), (5, 3, 6)),
    "linear of vectors": (lambda: linear(6, 7), (5, 6)),
    "linear without bias": (lambda: linear(6, 7, bias=False), (5, 3, 6)),
    "linear, weight frozen": (lambda: linear(6, 7, frozen=["weight"]), (5, 3, 6)),
    "linear, bias frozen": (lambda: linear(6, 7, frozen=["bias"]), (5, 3, 6)),
    "linear, not contiguous": (lambda: Transposed(linear(6, 7)), (5, 3, 6)),
    "linear, not contiguous, weight frozen": (lambda: Transposed(linear(6, 7, frozen=["weight"])), (5, 3, 6)),
    "linear, not contiguous, frozen": (lambda: Transposed(linear(6, 7, frozen=["weight"], bias=False)), (5, 3, 6)),
    "conv1d of transformers": (lambda: conv1d(7, 6), (5, 3, 6)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (5, 2, 7, 6)),
    "convolution, reflected": (lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="reflect"), (5, 2, 6)),
    "convolution in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 4, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (5, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (5, 3, 6)),
    "norm of llama": (lambda: llama_norm(6), (5, 3, 6)),
}


class Between(nn.Module):
    def __init__(self, layer, recompute=False):
        super().__init__()
        self.before, self.layer, self.recompute = nn.Linear(6, 6), layer, recompute

    def forward(self, x):
        if self.recompute:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x):
        return F.relu(self.layer(self.before(x)), inplace=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("recompute", "dtype"),
    [(False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)],
    ids=["bf16", "fp16", "recomputed"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_have_the_bits_of_torch_and_records_their_sum(name, recompute, dtype, tmp_path):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = Between(build(), recompute)
    for each in plain.parameters():
        each.data.normal_()
    recorded, values = copy.deepcopy(plain), torch.randn(shape)

    def backward(model):
        with torch.autocast("cpu", dtype):
            output = model(values)
        (output.float() - 1).square().mean().backward()
        return output

    expected = backward(plain)
    optimizer = gk.SGD([each for each in recorded.parameters() if each.requires_grad], lr=0.0)
    with gk.rollback.record(recorded, optimizer, tmp_path / "run", rank=64) as recorder:
        with recorder.batch(range(5)):
            assert torch.equal(backward(recorded), expected)
        grads = {name: each.grad.clone() for name, each in recorded.named_parameters() if each.requires_grad}
        for name, each in plain.named_parameters():
            assert (each.grad is None) == (name not in grads)
            assert name not in grads or torch.equal(each.grad, grads[name]), name
        optimizer.step()
    ledger = gk.rollback.open(tmp_path / "run")
    (segment,) = read_segments(ledger._store, backwards=True)
    layout = ledger._store.layout
    for stream, record in segment.records.items():
        grad = grads[layout.parameters[layout.streams[stream].parameter].name]
        total = torch.zeros(1, *grad.shape)
        record.add_to(total, torch.ones(1, 5))
        # int8 of the factors, and the rounding of the sum to the low precision.
        assert (total[0] - grad).norm() <= 0.02 * grad.norm()


def perceptron():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 3))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 2, groups=4),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


class Twice(nn.Module):
    """One layer called three times: autograd adds the gradients up in the low precision before it casts them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.body(x))
        return self.head(x)


def class_data():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(24, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def class_loss(model, rows):
    inputs, labels = class_data()
    return F.cross_entropy(model(inputs[rows]), labels[rows])


def tokens_loss(model, rows):
    data = token_data(24, 12, 31)
    return token_loss(model(data[rows]), data[rows])


MODELS = {
    "mlp": (perceptron, class_loss, ()),
    "cnn": (convolutional, class_loss, ("2.*",)),
    "a layer called three times": (Twice, class_loss, ()),
    "tied": (lambda: TokenModel(31), tokens_loss, ()),
    "gpt2": (gpt2, tokens_loss, ()),
    "llama": (llama, tokens_loss, ()),
}


def train(model, loss_of, recorder_of, *, steps, dtype, scaler):
    """Train with clipping, accumulation and a scaled loss; returns the last gradients."""
    model.train()
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=0.5)
    with recorder_of(model, optimizer) as batch:
        torch.manual_seed(1)
        for step in range(steps):
            optimizer.zero_grad()
            for micro in range(2):
                rows = torch.arange(4 * (2 * step + micro), 4 * (2 * step + micro + 1)) % 24
                with batch(rows):
                    with torch.autocast("cpu", dtype):
                        loss = 4 * loss_of(model, rows)
                    scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return [parameter.grad for parameter in model.parameters()]


@contextlib.contextmanager
def unrecorded(model, optimizer):
    yield lambda rows: contextlib.nullcontext()


RUNS = [(name, torch.bfloat16, gk.GradScaler) for name in MODELS]
RUNS += [("mlp", torch.float16, torch.amp.GradScaler), ("gpt2", torch.float16, gk.GradScaler)]


@pytest.mark.parametrize(("name", "dtype", "scaler"), RUNS)
def test_a_run_has_the_bits_of_the_unrecorded_one_and_the_law_holds(name, dtype, scaler, tmp_path):
    build, loss_of, unowned = MODELS[name]
    torch.manual_seed(0)
    plain = build()
    recorded = copy.deepcopy(plain)

    @contextlib.contextmanager
    def recording(model, optimizer):
        with gk.rollback.record(model, optimizer, tmp_path / "run", unowned=unowned) as recorder:
            yield recorder.batch

    def options():
        return {"steps": 14, "dtype": dtype, "scaler": scaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30)}

    expected = train(plain, loss_of, unrecorded, **options())
    found = train(recorded, loss_of, recording, **options())
    for ours, theirs in zip([*recorded.parameters(), *found], [*plain.parameters(), *expected], strict=True):
        assert torch.equal(ours, theirs)
    ledger = gk.rollback.open(tmp_path / "run")
    assert 8 <= ledger.steps < 14
    assert ledger.visits == 8 * ledger.steps
    report = ledger.verify(recorded)
    assert report.passed, str(report)


def test_rounded_logits_still_tell_a_cross_entropy(tmp_path):
    """Without an estimator a query warns where nothing is known of how later steps reacted."""
    torch.manual_seed(0)
    model = perceptron()
    inputs, labels = class_data()

    @contextlib.contextmanager
    def recording(model, optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
        with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
            yield recorder.batch

    scaler = gk.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    train(model, class_loss, recording, steps=10, dtype=torch.bfloat16, scaler=scaler)
    scores = gk.rollback.open(tmp_path / "run").scores(
        model, inputs[:1], loss_fn=lambda output, _: F.cross_entropy(output, labels[:1])
    )
    assert torch.isfinite(scores.scores).all()


def test_a_scale_that_grows_while_every_row_is_fitted_leaves_the_curvature_known(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(11 * torch.eye(3, 4))  # residuals of some 3e-5
    inputs, labels = torch.eye(3, 4).repeat(4, 1), torch.arange(3).repeat(4)
    optimizer, scaler = gk.SGD(model.parameters(), lr=1e-3), gk.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for step in range(8):
            ids = torch.arange(12)
            with recorder.batch(ids):
                # Wrong labels tell the scale of the first step, and of that alone.
                targets = labels.roll(1) if step == 0 else labels
                scaler.scale(F.cross_entropy(model(inputs), targets)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**12
    ledger = gk.rollback.open(tmp_path / "run")
    query = {"loss_fn": F.cross_entropy, "estimator": "ref"}
    assert torch.isfinite(ledger.scores(model, (inputs[:1], labels[:1]), **query).scores).all()


class Wide(nn.Module):
    """What recording computes by itself in backward: products of a grouped convolution, and logits that are large."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.inner = nn.Conv2d(4, 8, 3, groups=2), nn.LayerNorm(288), nn.Linear(288, 16)
        self.embed, self.head = nn.Embedding(10, 16), nn.Linear(16, 3000)

    def forward(self, x):
        found = torch.relu(self.inner(self.norm(self.conv(x).flatten(1))))
        return self.head(found[:, None] + self.embed(torch.arange(10).expand(len(x), -1)))


@pytest.mark.parametrize("is_lowered", [True, False], ids=["forward too", "forward in fp32"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backward_may_be_called_under_autocast(is_lowered, backend, tmp_path):
    torch.manual_seed(0)
    plain = Wide()
    inputs, labels = torch.randn(6, 4, 8, 8), torch.randint(3000, (6, 10))

    def run(model, recorder=None):
        optimizer = gk.AdamW(model.parameters(), lr=1e-3)
        recording = contextlib.nullcontext() if recorder is None else recorder(model, optimizer)
        with recording as batch:
            for _ in range(3):
                with contextlib.nullcontext() if batch is None else batch.batch(range(6)):
                    with torch.autocast("cpu", torch.bfloat16, enabled=is_lowered):
                        output = model(inputs)
                    with torch.autocast("cpu", torch.bfloat16):
                        F.cross_entropy(output.flatten(0, 1).float(), labels.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()

    recorded = copy.deepcopy(plain)
    with gk.use_backend(backend):
        run(plain)
        run(recorded, lambda model, optimizer: gk.rollback.record(model, optimizer, tmp_path / "run"))
    for ours, theirs in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    report = gk.rollback.open(tmp_path / "run").verify(recorded)
    assert report.passed, str(report)


class Beside(nn.Module):
    """Uses a recorded layer's weight, by way of the cast that autocast keeps, without calling the layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.body(x) + F.linear(torch.tanh(x), self.body.weight)


def test_a_use_that_was_not_captured_is_missed_though_the_cast_is_shared(tmp_path):
    torch.manual_seed(0)
    model, (inputs, labels) = Beside(), class_data()
    optimizer = gk.AdamW(model.parameters())
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(range(24)), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
        with pytest.raises(LedgerError, match="is not what the recorded batches gave it"):
            optimizer.step()


def test_a_gradient_to_be_differentiated_again_is_refused(tmp_path):
    model, (inputs, labels) = perceptron(), class_data()
    with gk.rollback.record(model, gk.AdamW(model.parameters()), tmp_path / "run") as recorder:
        with recorder.batch(range(24)), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels)
        with recorder.batch(range(24)), pytest.raises(LedgerError, match="create_graph=True"):
            loss.backward(create_graph=True)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of luck")


def test_a_failed_backward_leaves_nothing_in_a_cast_that_is_used_again(tmp_path):
    """While the context is open autocast keeps the cast, to which one of two uses has given its gradient by then."""
    torch.manual_seed(0)
    body, head, (_, labels) = nn.Linear(6, 6), nn.Linear(6, 3), class_data()
    model = nn.Sequential(body, head)
    inputs = torch.randn(24, 6)
    optimizer = gk.AdamW(model.parameters())

    def loss(between):
        return F.cross_entropy(head(torch.tanh(body(between(torch.tanh(body(inputs)))))), labels)

    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            with recorder.batch(range(24)), pytest.raises(RuntimeError, match="out of luck"):
                loss(Fails.apply).backward()
            optimizer.zero_grad()
            recorder.discard()
            with recorder.batch(range(24)):
                loss(lambda hidden: hidden).backward()
        optimizer.step()
    assert gk.rollback.open(tmp_path / "run").verify(model).passed
