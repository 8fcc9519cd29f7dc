"""What several test files share: a deterministic hypothesis, and registries left as they were found."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of PyTorch: there is a worker for each core

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

try:
    import interpreter  # noqa: F401
except ModuleNotFoundError:  # Triton is for Linux
    collect_ignore = ["test_blocks.py", "test_kernels.py", "test_lab_grammar.py", "test_lower.py"]

import goal

settings.register_profile("deterministic", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("deterministic")

# Files of few tests that take long, the longest first: begun last they would be waited for while other cores idle.
LONG = ("kernels", "distributed", "blocks", "cli", "training_ranks", "lab_search", "compile_report", "compile")


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist hands files out in the order below, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of most tests."""
    sizes = Counter(item.path for item in items)
    long = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: (long.get(item.path.name, len(LONG)), -sizes[item.path], str(item.path)))


@contextmanager
def kept_registries() -> Iterator[None]:
    kept = [(registry, dict(registry._definitions)) for registry in (goal.T, goal.P)]
    yield
    for registry, definitions in kept:
        registry._definitions.clear()
        registry._definitions.update(definitions)


@pytest.fixture
def registries() -> Iterator[None]:
    """Terms that a test registers are gone after it."""
    with kept_registries():
        yield


@pytest.fixture(scope="module", autouse=True)
def registries_of_a_file() -> Iterator[None]:
    """And those of a file after that, such as what a search finds, which stays registered."""
    with kept_registries():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
