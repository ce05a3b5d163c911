from collections.abc import Iterator

import pytest

from quicksilver_ext import testing


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
