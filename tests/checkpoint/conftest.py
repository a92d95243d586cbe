"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import gc

import pytest
import torch
from checkpoint_cases import CASES, Case, cnn, gpt2, mlp


@pytest.fixture(autouse=True)
def nothing_of_other_tests():
    """What a caught error keeps in a cycle would count in one measurement and be collected before the next."""
    gc.collect()


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small run fastest on one thread, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture
def gpt2_case() -> Case:
    return gpt2()


@pytest.fixture
def cnn_case() -> Case:
    return cnn()


@pytest.fixture
def mlp_case() -> Case:
    return mlp()
