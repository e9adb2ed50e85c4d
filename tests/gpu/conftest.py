"""What runs on a GPU, by python -m pytest tests/gpu; where there is none, it is skipped."""

import pytest
import torch

from tests.dist.conftest import job  # noqa: F401  a fixture here too


def pytest_runtest_setup(item):
    """Before fixtures; so said, it is one line of pytest's summary."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


@pytest.fixture
def device() -> str:
    return "cuda"
