"""What several test files share: a deterministic hypothesis, and registries left as they were found."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of Triton, which is made for one or the other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of PyTorch: there is a worker for each core

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import goal

settings.register_profile("deterministic", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("deterministic")


@pytest.fixture
def registries() -> Iterator[None]:
    """Terms that a test registers are gone after it."""
    kept = [(registry, dict(registry._definitions)) for registry in (goal.T, goal.P)]
    yield
    for registry, definitions in kept:
        registry._definitions.clear()
        registry._definitions.update(definitions)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
