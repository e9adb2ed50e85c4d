"""Every kernel, compiled for GPUs that need not be here: nothing is spilled, and memory is read 16 bytes at a time."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from itertools import chain

import pytest

from megalite.kernels import dispatch
from tests.kernels import ahead_of_time
from tests.kernels.checks import REPOSITORY

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
# A row's or a program's single numbers: its statistics, its target and that one's logit, its factors.
NARROW = {
    "rms_norm._forward_kernel": 1,
    "rms_norm._backward_kernel": 1,
    "cross_entropy._statistics_kernel": 7,
    "cross_entropy._gradient_kernel": 5,
}


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory) -> dict[str, list[dict]]:
    """Of each case, its kernels: one process for each architecture."""
    if not dispatch.INSTALLED:
        pytest.skip("triton is not installed")
    found = defaultdict(list)
    running = {}
    try:
        for architecture in ARCHITECTURES:
            cache = tmp_path_factory.mktemp("triton")
            environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
            running[architecture] = subprocess.Popen(
                [sys.executable, ahead_of_time.__file__, str(architecture)],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for architecture, process in running.items():
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            for description in map(json.loads, output.splitlines()):
                found[description["case"]].append(description | {"architecture": architecture})
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return found


def is_wide(access: str) -> bool:
    """16 bytes a thread: ld.global.v4.b32, LDG.E.128."""
    if access.isupper():
        return re.search(r"\.(128|256)\b", access) is not None
    count, bits = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", access).groups()
    return int(count or 1) * int(bits) >= 128


@pytest.mark.parametrize(
    ("access", "wide"),
    [
        ("ld.global.v4.b32", True),
        ("st.global.L1::evict_first.v4.b32", True),
        ("ld.global.v2.b64", True),
        ("ld.global.v2.b32", False),
        ("st.global.b64", False),
        ("LDG.E.128", True),
        ("LDG.E.128.CONSTANT", True),
        ("STG.E.64", False),
        ("LDG.E.U16", False),
    ],
)
def test_wide(access, wide):
    assert is_wide(access) == wide


def faults(kernel: dict) -> list[str]:
    """What is wrong with what the compiler made of a kernel."""
    found = [f"{kernel['stack']} bytes of stack"] if kernel["stack"] else []
    if kernel["fp64"]:
        found.append("arithmetic in fp64")
    for assembly in ("ptx", "sass"):
        narrow = {access: count for access, count in kernel[assembly].items() if not is_wide(access)}
        if sum(narrow.values()) > NARROW.get(kernel["kernel"], 0):
            found.append(f"narrow accesses: {narrow}")
    return found


@pytest.mark.parametrize("case", ahead_of_time.CASES)
def test_compiled_ahead(descriptions, case):
    """Forward and backward, in bf16 and fp32, for all architectures."""
    kernels = descriptions[case]
    assert len(kernels) >= 4 * len(ARCHITECTURES)
    found = [
        f"{each['kernel']} in {each['dtype']}, sm_{each['architecture']}, {each['warps']} warps, "
        f"{each['registers']} registers: {fault}"
        for each in kernels
        for fault in faults(each)
    ]
    assert not found, "\n".join(found)


def test_each_kernel_is_disassembled(descriptions):
    kernels = defaultdict(int)
    for each in chain.from_iterable(descriptions.values()):
        kernels[each["kernel"], each["architecture"]] += len(each["sass"])
    assert all(kernels.values())
    assert len(kernels) == 9 * len(ARCHITECTURES)
