"""Kernels as a user gets them: torch on the CPU, also in the process that runs tests/kernels in the interpreter."""

import pytest

import tests.kernels  # noqa: F401  it sets how Triton is imported

# isort: split
from megalite.kernels import dispatch

dispatch.INTERPRETED = False


@pytest.fixture(autouse=True)
def kernel_choice():
    """tests/kernels has a fixture of this name too, which stands in its place there."""
    with dispatch.using("auto"):
        yield
