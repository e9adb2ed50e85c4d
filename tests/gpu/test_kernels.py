"""The checks of tests/kernels, with the kernels compiled: a class for each of its files, of the tests with a device."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megalite import kernels
from megalite.kernels import dispatch
from megalite.kernels.softmax import softmax_reference

pytestmark = pytest.mark.gpu
FILES = sorted((Path(__file__).parents[1] / "kernels").glob("test_*.py"))


@pytest.fixture(autouse=True)
def kernel_choice():
    """Triton or an error, so that no test passes by falling back to torch."""
    with dispatch.using("triton"):
        yield


def with_a_device(module: ModuleType) -> dict[str, staticmethod]:
    functions = inspect.getmembers(module, inspect.isfunction)
    tests = {name: function for name, function in functions if name.startswith("test_")}
    return {name: staticmethod(test) for name, test in tests.items() if "device" in inspect.signature(test).parameters}


for file in FILES:
    if checks := with_a_device(importlib.import_module(f"tests.kernels.{file.stem}")):
        name = "Test" + file.stem.removeprefix("test").title().replace("_", "")
        globals()[name] = type(name, (), checks)


def test_softmax_of_more_than_2_to_31_elements():
    scores = torch.randn(16400, 131072, dtype=torch.bfloat16, device="cuda")
    got = kernels.softmax(scores)
    torch.testing.assert_close(got[-2:], softmax_reference(scores[-2:]), rtol=1e-2, atol=1e-7)
