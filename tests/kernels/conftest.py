"""Every test here runs the Triton kernels: on the GPU where there is one, else in the interpreter on the CPU."""

import pytest
import torch

from megalite.kernels import dispatch
from tests.kernels import INTERPRETED

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def kernel_choice(monkeypatch):
    """Triton or an error, so that no test passes by falling back to torch."""
    if not dispatch.INSTALLED:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(dispatch, "INTERPRETED", INTERPRETED)
    with dispatch.using("triton"):
        yield
