"""Tensors of equal content are written once and read back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded_models import token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._sharing import share_equal, unshare
from gradkern.rollback._store import StoreReader

DTYPES = (torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.uint8)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(DTYPES), st.sampled_from([(128,), (8, 16), (2, 2), (0,)])))
)
def test_all_is_read_back(choices):
    named = {
        f"tensor/{at}": (torch.arange(torch.Size(shape).numel()) * (seed + 1) % 100).to(dtype).reshape(shape)
        for at, (seed, dtype, shape) in enumerate(choices)
    }
    kept = share_equal(named)
    found = unshare(kept)
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    large = [tensor for tensor in named.values() if tensor.nbytes >= 128]
    contents = {(tensor.dtype, tuple(tensor.flatten().tolist())) for tensor in large}
    assert len(kept.keys() - {"shared"}) == len(named) - len(large) + len(contents)


def test_signed_zeros_and_nans_are_told_apart():
    zeros, negative = torch.zeros(64), -torch.zeros(64)
    nans = torch.full((64,), torch.nan)
    kept = share_equal({"a": zeros, "b": negative, "c": nans, "d": nans.clone()})
    assert kept.keys() == {"a", "b", "c", "shared"}
    assert torch.signbit(unshare(kept)["b"]).all()
    assert unshare(kept)["d"].isnan().all()


def test_dtypes_are_told_apart():
    signed, unsigned = torch.zeros(128, dtype=torch.int8), torch.zeros(128, dtype=torch.uint8)
    named = {"a": signed, "b": signed.clone(), "c": unsigned, "d": unsigned.clone()}
    kept = share_equal(named)
    assert kept.keys() == {"a", "c", "shared"}
    assert [tensor.dtype for _, tensor in sorted(unshare(kept).items())] == [torch.int8] * 2 + [torch.uint8] * 2


def test_tensors_that_are_not_contiguous():
    matrix = torch.arange(256, dtype=torch.float32).reshape(16, 16)
    kept = share_equal({"a": matrix, "b": matrix.t(), "c": matrix.t().contiguous()})
    assert kept.keys() == {"a", "b", "shared"}
    assert torch.equal(unshare(kept)["c"], matrix.t())


@pytest.mark.parametrize("text", ["{", '{"b": ["missing", [2]]}', '{"b": ["a", [3]]}', "[1]", '{"b": 3}'])
def test_what_cannot_be_read_is_refused(text):
    named = {"a": torch.zeros(2), "shared": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    with pytest.raises(LedgerError, match="shares tensors that it does not hold"):
        unshare(named)


def test_biases_of_a_classifier_take_no_bytes(tmp_path):
    """The digits classifier of the benchmarks, whose target is 410 bytes a visit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = gk.AdamW(model.parameters(), lr=1e-3)
    with gk.rollback.record(model, optimizer, tmp_path / "run", steps_per_segment=10) as recorder:
        for _ in range(20):
            with recorder.batch(range(50)):
                nn.functional.cross_entropy(model(torch.randn(50, 64)), torch.arange(50) % 10).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    sizes = ledger.layer_bytes()
    # Of rank 1: both factors in int8 and their scales.
    assert sizes["2", "2.weight"] == ledger.visits * (64 + 32 + 8)
    assert all(nbytes == 0 for (_, name), nbytes in sizes.items() if name.endswith("bias"))
    records = sum(entry.bytes for entry in StoreReader(tmp_path / "run").segments)
    assert records / ledger.visits < 380
    assert ledger.verify(model).passed


def test_a_segment_whose_shared_tensors_become_small_can_be_cut(tmp_path, token_model):
    data = token_data()
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run", rewind=4) as recorder:
        for _ in range(8):  # 160 bytes of visit numbers in each stream, of which 80 are left
            with recorder.batch(range(5)):
                token_loss(token_model(data[:5]), data[:5]).backward()
            optimizer.step()
            optimizer.zero_grad()
        recorder.rewind(steps=4)
    assert gk.rollback.open(tmp_path / "run").steps == 4
    assert gk.rollback.open(tmp_path / "run").verify(token_model).passed
