from collections.abc import Iterator

import pytest
import torch

from quicksilver_ext import _C
from quicksilver_ext.kernels import testing


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, unless a test asks for `two_threads`: PyTorch's own threads wait for each other at every small
    operator, which takes seconds where somebody else wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    """For what must not depend on the number of threads in the kernels' pool."""
    _C.set_threads(2)


@pytest.fixture(params=testing.backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend that this machine has."""
    with testing.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in testing.backends() if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each compiled backend: the promises bit for bit are theirs, not PyTorch's."""
    with testing.use_backend(request.param):
        yield request.param
