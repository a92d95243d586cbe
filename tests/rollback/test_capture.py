"""Recording leaves training as it was: same bits, same state, same memory, one visit under recomputation."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_models import TokenModel, gpt2, token_data, token_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._capture import captured
from gradkern.rollback._ownership import claim
from gradkern.rollback._reading import read_segments


class DeafSink:
    """Takes nothing; what is left is the capturing functions' own arithmetic."""

    paused = False

    def expand_shared(self, layer, output, ids):
        return output

    def ignore(self, *args):
        pass

    take_matrix = take_logits = take_bias = take_embedding = take_norm = take_vectors = ignore


def gradients(module, inputs, output_grad):
    module.zero_grad()
    inputs = inputs.clone().requires_grad_(inputs.is_floating_point())
    output = module(inputs)
    output.backward(output_grad.expand_as(output) if output_grad.numel() == 1 else output_grad)
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return output.detach(), {**found, "input": inputs.grad}


def assert_same_bits(module, inputs):
    with torch.no_grad():
        output_grad = torch.randn_like(module(inputs))
    plain = gradients(module, inputs, output_grad)
    layers = claim(module, list(module.parameters()), (), ()).layers
    with captured(layers, DeafSink()):
        recorded = gradients(module, inputs, output_grad)
    assert torch.equal(plain[0], recorded[0])
    for name, gradient in plain[1].items():
        assert (gradient is None) == (recorded[1][name] is None), name
        if gradient is not None:
            assert torch.equal(gradient, recorded[1][name]), name


leading = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
# From 2 features: for one feature of one row torch itself takes another dot product.
@given(leading, st.integers(2, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_linear_gradients_have_the_same_bits(leading, inputs, outputs, bias, transposed):
    values = torch.randn(*leading, inputs)
    if transposed and len(leading) > 1:
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(nn.Sequential(nn.Linear(inputs, outputs, bias=bias)), values)


@settings(deadline=None, max_examples=20)
@given(leading, st.integers(2, 40), st.integers(1, 40))
def test_conv1d_gradients_have_the_same_bits(leading, inputs, outputs):
    from transformers.pytorch_utils import Conv1D

    assert_same_bits(nn.Sequential(Conv1D(outputs, inputs)), torch.randn(*leading, inputs))


@settings(deadline=None, max_examples=20)
@given(leading, st.integers(2, 40), st.booleans(), st.booleans())
def test_layer_norm_gradients_have_the_same_bits(leading, width, bias, two_dimensional):
    shape = (3, width) if two_dimensional else (width,)
    assert_same_bits(nn.Sequential(nn.LayerNorm(shape, bias=bias)), torch.randn(*leading, *shape))


@settings(deadline=None, max_examples=20)
@given(leading, st.integers(1, 20), st.booleans())
def test_embedding_gradients_have_the_same_bits(leading, width, padded):
    module = nn.Sequential(nn.Embedding(5, width, padding_idx=3 if padded else None))
    assert_same_bits(module, torch.randint(0, 5, leading))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (5, 3, 9)),
    "2d": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 9, 8)),
    "2d without bias": (nn.Conv2d(3, 4, (1, 3), dilation=(1, 2), bias=False), (5, 3, 6, 7)),
    "2d, longer on one side": (nn.Conv2d(2, 4, (2, 4), padding="same"), (5, 2, 6, 7)),
    "2d, reflected": (nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect"), (5, 2, 6, 7)),
    "2d, nothing around": (nn.Conv2d(2, 4, 3, padding="valid"), (5, 2, 6, 7)),
    "2d in groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 6, 7)),
    "2d by channel": (nn.Conv2d(4, 4, 3, groups=4), (5, 4, 6, 7)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (5, 2, 4, 5, 6)),
    "group norm": (nn.GroupNorm(2, 6), (5, 6, 3, 4)),
    "group norm of vectors": (nn.GroupNorm(3, 6), (5, 6)),
    "group norm, channels last": (nn.GroupNorm(2, 6), (5, 6, 3, 4)),
    "rms norm": (nn.RMSNorm(6), (5, 3, 6)),
    "rms norm, two dimensions": (nn.RMSNorm((3, 6), eps=1e-3), (5, 3, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_norms_have_the_same_bits(name):
    module, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    values = torch.randn(shape)
    if "channels last" in name:
        values = values.to(memory_format=torch.channels_last)
    assert_same_bits(nn.Sequential(module), values)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_norms_are_recorded_by_sample(name, tmp_path):
    torch.manual_seed(0)
    module, shape = CONVOLUTIONS[name]
    model = nn.Sequential(copy.deepcopy(module))
    for param in model.parameters():
        param.data.normal_()
    values, target = torch.randn(shape), torch.randn(())
    optimizer = gk.SGD(model.parameters(), lr=0.0)
    with gk.rollback.record(model, optimizer, tmp_path / "run", rank=500) as recorder:
        with recorder.batch(range(5)):
            (model(values) - target).square().sum().backward()
        optimizer.step()
    (segment,) = read_segments(gk.rollback.open(tmp_path / "run")._store, backwards=True)
    parameters = list(model.parameters())
    for sample in range(5):
        expected = torch.autograd.grad((model(values[sample : sample + 1]) - target).square().sum(), parameters)
        for stream, record in segment.records.items():
            basis = torch.eye(expected[stream].numel()).reshape(-1, *expected[stream].shape)
            found = record.inner(basis)[:, sample].reshape(expected[stream].shape)
            assert (found - expected[stream]).norm() <= 0.02 * expected[stream].norm()
            sums = torch.zeros(1, *expected[stream].shape)
            record.add_to(sums, torch.eye(5)[sample : sample + 1])
            torch.testing.assert_close(sums[0], found)


def test_a_convolution_of_one_sample_without_its_dimension_is_refused(tmp_path):
    model = nn.Conv1d(2, 3, 2)
    optimizer = gk.SGD(model.parameters(), lr=0.1)
    refused = pytest.raises(LedgerError, match=r"convolution '' got an input of shape \(2, 5\).*unsqueeze\(0\)")
    with gk.rollback.record(model, optimizer, tmp_path / "run"), refused:
        model(torch.randn(2, 5))


def test_norms_of_transformers_are_known_by_what_they_compute():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for norm in (LlamaRMSNorm(8), Qwen3RMSNorm(8, eps=1e-3)):
        norm.weight.data.normal_()
        assert_same_bits(nn.Sequential(norm), torch.randn(4, 3, 8))
    other = nn.Sequential(GemmaRMSNorm(8))  # its factor is 1 + weight
    with pytest.raises(ValueError, match=r"no per-sample gradient can be captured for '0\.weight'"):
        claim(other, list(other.parameters()), (), ())


@pytest.mark.parametrize("build", [TokenModel, gpt2], ids=["token model", "gpt2"])
def test_a_recorded_run_ends_with_the_same_bits(build, tmp_path):
    torch.manual_seed(0)
    plain = build().train()
    recorded = copy.deepcopy(plain)
    data = token_data()

    def run(model, recorder, optimizer):
        torch.manual_seed(1)  # for dropout
        for start in range(0, 24, 4):
            rows = slice(start, start + 4)
            if recorder is None:
                token_loss(model(data[rows]), data[rows]).backward()
            else:
                with recorder.batch(range(start, start + 4)):
                    token_loss(model(data[rows]), data[rows]).backward()
            if start % 8:
                optimizer.step()
                optimizer.zero_grad()

    run(plain, None, gk.AdamW(plain.parameters(), max_norm=1.0))
    optimizer = gk.AdamW(recorded.parameters(), max_norm=1.0)
    with gk.rollback.record(recorded, optimizer, tmp_path / "run") as recorder:
        run(recorded, recorder, optimizer)
    for (name, expected), got in zip(plain.named_parameters(), recorded.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_the_model_is_restored_and_its_keys_never_change(token_model, tmp_path):
    keys, before = list(token_model.state_dict()), {name: id(m) for name, m in token_model.named_modules()}
    optimizer = gk.AdamW(token_model.parameters())
    with gk.rollback.record(token_model, optimizer, tmp_path / "run"):
        assert list(token_model.state_dict()) == keys
        assert {name: id(module) for name, module in token_model.named_modules()} == before
        assert "forward" in vars(token_model.hidden)
    assert all("forward" not in vars(module) for module in token_model.modules())
    token_loss(token_model(token_data()), token_data()).backward()  # outside a batch: nobody objects any more


def test_a_copy_made_while_recording_is_an_ordinary_model(token_model, tmp_path):
    optimizer = gk.AdamW(token_model.parameters())
    data = token_data()
    with gk.rollback.record(token_model, optimizer, tmp_path / "run"):
        twin = copy.deepcopy(token_model)
        with torch.no_grad():
            token_model.hidden.weight.zero_()
        assert not torch.equal(twin(data), token_model(data))
        token_loss(twin(data), data).backward()
        assert twin.hidden.weight.grad is not None
        assert token_model.hidden.weight.grad is None


class Blocks(nn.Module):
    """The same stack with and without recomputation."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.1), nn.Linear(9, 6))
            for _ in range(3)
        )
        self.head = nn.Linear(6, 11)
        self.recompute = recompute

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return self.head(x)


def test_recomputed_layers_are_recorded_once(train, tmp_path):
    torch.manual_seed(0)
    plain = Blocks(recompute=False)
    recomputed = copy.deepcopy(plain)
    recomputed.recompute = True
    folders = []
    for name, model in (("plain", plain), ("recomputed", recomputed)):
        torch.manual_seed(1)
        run = train(model, token_data(), name=name)
        assert run.ledger().verify(model).passed
        folders.append(run.path)
    files = [sorted(folder.rglob("*.safetensors")) for folder in folders]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for plain_file, recomputed_file in zip(*files, strict=True):
        assert plain_file.read_bytes() == recomputed_file.read_bytes()


@pytest.mark.parametrize("order", ["plan first", "recorder first"])
def test_a_checkpoint_plan_and_a_recorder_share_a_model(order, tmp_path):
    torch.manual_seed(0)
    model, data = gpt2(layers=3, width=32, length=64), token_data(8, 64, 31)
    generous = gk.checkpoint.plan(model, data, token_loss, budget="1 GiB")
    plan = gk.checkpoint.plan(model, data, token_loss, budget=generous.least_feasible_bytes)
    assert any(unit.option != "keep" for unit in plan.units)
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    if order == "plan first":
        plan.apply(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        if order == "recorder first":
            plan.apply(model)
        for _ in range(3):
            with recorder.batch(range(8)):
                token_loss(model(data), data).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits) == (3, 24)
    assert ledger.verify(model).passed
    for segment in read_segments(ledger._store, backwards=True):
        assert all(len(record.visit) == 24 for record in segment.records.values())


def test_recording_saves_no_more_for_backward_than_autograd_does(token_model, tmp_path):
    data = token_data()

    def saved_bytes():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = token_loss(token_model(data), data)
        del loss
        return sum(storages.values())

    plain = saved_bytes()
    with gk.rollback.record(token_model, gk.AdamW(token_model.parameters()), tmp_path / "run"):
        assert saved_bytes() <= plain


def test_a_gradient_outside_a_batch_is_refused(token_model, tmp_path):
    optimizer = gk.AdamW(token_model.parameters())
    with gk.rollback.record(token_model, optimizer, tmp_path / "run"):
        loss = token_loss(token_model(token_data()), token_data())
        with pytest.raises(LedgerError, match=r"'head' outside 'with recorder\.batch\(ids\)'"):
            loss.backward()


def test_a_recorded_forward_leaves_no_cycle(token_model, tmp_path):
    """What forward made goes with the last reference, not with the next garbage collection."""
    optimizer = gk.AdamW(token_model.parameters())
    with gk.rollback.record(token_model, optimizer, tmp_path / "run") as recorder, recorder.batch(range(4)):
        gc.collect()
        gc.disable()
        try:
            output = token_model(torch.zeros(4, 8, dtype=torch.int64))
            node = output.grad_fn
            while node.name() not in ("AddmmBackward0", "MmBackward0"):
                node = node.next_functions[0][0]
            probe = weakref.ref(node.metadata.setdefault("probe", Probe()))
            del node, output
            assert probe() is None
        finally:
            gc.enable()


class Probe:
    pass


class Shared(nn.Module):
    """Two checkpointed segments around one layer, as reentrant checkpointing runs them: a backward pass each."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(lambda each: torch.tanh(self.body(each)), x, use_reentrant=True)
        return self.head(x)


def train_classes(model, path, *, steps=9, each_batch=None, **options):
    torch.manual_seed(1)
    inputs, labels = torch.randn(8, 6), torch.arange(8) % 3
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for step in range(steps):
            with recorder.batch(range(8)):
                if each_batch is not None:
                    each_batch(recorder, optimizer, model, inputs, step)
                nn.functional.cross_entropy(model(inputs.requires_grad_()), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return gk.rollback.open(path)


def test_gradients_outside_a_batch_leave_nothing_behind(tmp_path):
    """Not even of a bias alone, once they are discarded as the error says."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 6)
    model[0].weight.requires_grad_(False)
    optimizer = gk.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for step in range(3):
            if step == 1:
                with pytest.raises(LedgerError, match="belongs to no sample"):
                    (100 * model[0](inputs)).sum().backward()
                optimizer.zero_grad()
                recorder.discard()
            with recorder.batch(range(8)):
                nn.functional.cross_entropy(model(inputs), torch.arange(8) % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gk.rollback.open(tmp_path / "run").verify(model).passed


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
def test_a_failed_backward_is_discarded_whole(tmp_path, is_inside):
    """Also where clearing gradients in place changes those that wait, of which they may be."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 6)
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)

    def loss(fails):
        hidden = model[:2](inputs)
        return nn.functional.cross_entropy(model[2](Fails.apply(hidden) if fails else hidden), torch.arange(8) % 3)

    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for step in range(3):
            if step == 1:
                with recorder.batch(range(100, 108)):
                    with pytest.raises(RuntimeError, match="out of luck"):
                        loss(True).backward()
                    if is_inside:
                        optimizer.zero_grad(set_to_none=False)
                        recorder.discard()
                optimizer.zero_grad()
                recorder.discard()
            with recorder.batch(range(8)):
                loss(False).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.verify(model).passed
    assert ledger.visits == 24
    (segment,) = read_segments(ledger._store)
    assert all(record.visit.tolist() == list(range(24)) for record in segment.records.values())


def test_a_layer_in_two_reentrant_segments(tmp_path):
    torch.manual_seed(0)
    model = Shared()
    assert train_classes(model, tmp_path / "run").verify(model).passed


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of luck")


def test_a_backward_that_failed_can_be_discarded_and_tried_again(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def fail(recorder, optimizer, model, inputs, step):
        if step in (0, 3):
            hidden = Fails.apply(model[0](inputs))
            with pytest.raises(RuntimeError, match="out of luck"):
                model[2](hidden).sum().backward()
            recorder.discard()
            optimizer.zero_grad()

    ledger = train_classes(model, tmp_path / "run", each_batch=fail)
    assert ledger.visits == 9 * 8
    assert ledger.verify(model).passed


def test_gradients_that_are_differentiated_again_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def penalise(recorder, optimizer, model, inputs, step):
        torch.autograd.grad(model(inputs.requires_grad_()).sum(), inputs, create_graph=True)

    with pytest.raises(LedgerError, match=r"create_graph=True.*recorder\.paused"):
        train_classes(model, tmp_path / "run", each_batch=penalise)

    def look(recorder, optimizer, model, inputs, step):
        with recorder.paused():
            penalise(recorder, optimizer, model, inputs, step)

    assert train_classes(model, tmp_path / "other", each_batch=look).verify(model).passed


def test_gradients_edited_by_hooks_are_noticed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))

    def halve(parameter):
        parameter.grad.mul_(0.5)

    model[0].weight.register_post_accumulate_grad_hook(halve)
    with pytest.raises(LedgerError, match=r"'0\.weight' at this step is not what the recorded batches gave it"):
        train_classes(model, tmp_path / "run")


def test_gradients_changed_in_place_before_they_arrive_are_noticed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
    node = model[2].weight.expand_as(model[2].weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda grads: grads[0].mul_(0.5) and None)
    with pytest.raises(LedgerError, match=r"gradient of '2\.weight' was changed in place before backward had ended"):
        train_classes(model, tmp_path / "run")


def test_logits_that_the_loss_changes_in_place(tmp_path):
    """Small logits are kept until backward. A loss of twice them is no cross-entropy of what the layer gave."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 6)
    optimizer = gk.SGD(model.parameters(), lr=0.1)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder, recorder.batch(range(8)):
        nn.functional.cross_entropy(model(inputs).mul_(2.0), torch.arange(8) % 3).backward()
        optimizer.step()
    (segment,) = read_segments(gk.rollback.open(tmp_path / "run")._store)
    assert torch.isnan(segment.curvature).all()


def test_a_model_in_channels_last(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).to(memory_format=torch.channels_last)
    assert train_classes(model, tmp_path / "run").verify(model).passed


def test_weights_of_the_moment_make_the_logits(tmp_path):
    """Curvature is read from the weights that forward used, here others than the layer's own."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = gk.SGD(model.parameters(), lr=0.1)
    other = {name: torch.nn.Parameter(2 * each.detach()) for name, each in model.named_parameters()}
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder, recorder.batch(range(8)):
        logits = torch.func.functional_call(model, other, torch.randn(8, 6, requires_grad=True))
        nn.functional.cross_entropy(logits, torch.arange(8) % 3).backward()
        (visits,) = [bends for _, bends in recorder._intake._visits.bends]
        assert torch.isfinite(visits).all()
        recorder.discard()
