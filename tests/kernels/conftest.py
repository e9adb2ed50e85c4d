"""The Triton kernels in the interpreter, on the CPU. On a GPU it is tests/gpu that runs the tests with a device."""

import pytest

from megalite.kernels import dispatch
from tests.kernels import INTERPRETED


@pytest.fixture
def device() -> str:
    if not INTERPRETED:
        pytest.skip("there is a GPU here: tests/gpu runs this on it")
    return "cpu"


@pytest.fixture(autouse=True)
def kernel_choice(monkeypatch):
    """Triton or an error, so that no test passes by falling back to torch."""
    if not dispatch.INSTALLED:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(dispatch, "INTERPRETED", INTERPRETED)
    with dispatch.using("triton"):
        yield
