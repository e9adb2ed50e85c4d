"""Which operators run in Triton, and what is said where they cannot; the interpreter's bf16; the model with kernels."""

import logging
import re
import subprocess
import sys
from typing import get_args

import pytest
import torch

from megalite import kernels
from megalite.config import KernelChoice, ModelConfig
from megalite.errors import ConfigError
from megalite.kernels import dispatch
from megalite.kernels.dispatch import choose, problem, tl, triton, use, using
from megalite.pretrain import use_kernels
from tests.kernels.checks import REPOSITORY, ROUNDING, draw
from tests.unit.tiny_model import CHECKPOINTING, loss_and_gradients, make_batch, make_stage

MINE = {"rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
IN_INTERPRETER = pytest.mark.skipif(
    not dispatch.INTERPRETED and torch.cuda.is_available(), reason="kernels are compiled"
)


def test_the_config_offers_what_there_is():
    assert get_args(KernelChoice) == dispatch.CHOICES
    manual = ModelConfig.model_fields["kernels"].description
    for op in dispatch.OPERATORS:
        assert op in manual
        assert ModelConfig(kernels={op: "torch"}).kernels == {op: "torch"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layer_norm": "torch"}, "model.kernels: no kernel is called 'layer_norm'; there are cross_entropy, "),
        ({"rope": "fast"}, "model.kernels: rope: 'fast' is none of auto, triton, torch"),
        ("triton", "model.kernels: triton cannot run: on a CPU it needs TRITON_INTERPRET=1, "),
    ],
)
def test_what_cannot_run_is_an_error_of_the_configuration(monkeypatch, setting, message):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ConfigError) as caught:
        use_kernels(setting, "cpu")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("choice", ["triton", "torch"])
@pytest.mark.parametrize(
    ("message", "call"),
    {
        "rms_norm: weight is [7], and the others ask for [8]": lambda x: kernels.rms_norm(x, x[0, 0, :7]),
        "rms_norm: residual is [1, 2, 8], ": lambda x: kernels.rms_norm(x, x[0, 0], residual=x[:1]),
        "swiglu: up is [3, 1, 8], ": lambda x: kernels.swiglu(x, x[:, :1]),
        "swiglu: gate is torch.float32, and up torch.bfloat16": lambda x: kernels.swiglu(x, x.bfloat16()),
        "rope: k is [2, 2, 1, 8], ": lambda x: kernels.rope(
            x.unsqueeze(2), x[:2].unsqueeze(2), x[:, :, :4], x[:, :, :4]
        ),
        "cross_entropy: targets is [2, 3], and the others ask for [3, 2]": lambda x: kernels.cross_entropy(
            x, torch.zeros(2, 3, dtype=torch.int64)
        ),
        "linear_cross_entropy: targets is [6], ": lambda x: kernels.linear_cross_entropy(
            x, x[0], torch.zeros(6, dtype=torch.int64)
        ),
    }.items(),
    ids=lambda part: part.split(",")[0] if isinstance(part, str) else "",
)
def test_shapes_that_do_not_fit_are_refused(choice, message, call):
    """Where torch would broadcast, a kernel would read what lies behind a tensor."""
    with using(choice), pytest.raises(ValueError, match=re.escape(message)):
        call(torch.randn(3, 2, 8))


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_each_operator_exists(op):
    assert callable(getattr(kernels, op))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cuda", "'cuda' is none of auto, triton, torch"),
        ({"rope": "cuda"}, "rope: 'cuda' is none of auto, triton, torch"),
        ({"norm": "torch"}, "no kernel is called 'norm'; there are cross_entropy, "),
    ],
)
def test_unknown_names(setting, message):
    before = dict(dispatch._choices)
    with pytest.raises(ValueError, match=message):
        use(setting)
    assert dispatch._choices == before, "a setting that is refused changes nothing"


def test_a_mapping_leaves_the_others_auto(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with using({"rope": "triton"}):
        assert not choose("swiglu", torch.ones(1))
        with pytest.raises(RuntimeError):
            choose("rope", torch.ones(1))


@pytest.mark.parametrize("outer", ["auto", {"rope": "torch"}])
def test_using_ends(outer):
    use(outer)
    before = dict(dispatch._choices)
    with pytest.raises(KeyError), using("triton"):
        raise KeyError
    assert dispatch._choices == before


@pytest.mark.parametrize(
    ("setting", "interpreted", "device_type", "dtype", "runs"),
    [
        ("auto", False, "cpu", torch.float32, False),
        ("auto", True, "cpu", torch.float32, True),
        ("auto", True, "cpu", torch.float64, True),
        ("auto", True, "cpu", torch.complex64, True),  # only floating-point numbers are looked at
        ("auto", True, "cpu", torch.float8_e4m3fn, False),
        ("auto", False, "meta", torch.float32, False),
        ("torch", True, "cpu", torch.float32, False),
        ("triton", True, "cpu", torch.float32, True),
        ("triton", False, "cpu", torch.float32, "on a CPU it needs TRITON_INTERPRET=1"),
        ("triton", True, "cpu", torch.float8_e4m3fn, "there are no kernels for torch.float8_e4m3fn"),
        ("triton", True, "meta", torch.float32, "there are no kernels for meta"),
    ],
)
def test_choices(monkeypatch, setting, interpreted, device_type, dtype, runs):
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    x = torch.empty(2, dtype=dtype, device=device_type)
    with using(setting):
        if isinstance(runs, bool):
            assert choose("rms_norm", x, None) == runs
        else:
            with pytest.raises(RuntimeError, match=rf"^rms_norm: triton cannot run: {runs}.*take auto or torch"):
                choose("rms_norm", None, x)


class OnGPU:
    """A tensor as `choose` sees it, of a device that need not be here."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def is_floating_point(self) -> bool:
        return True


def test_choices_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with using("auto"):
        assert choose("rms_norm", OnGPU(torch.bfloat16))
        assert not choose("rms_norm", OnGPU(torch.bfloat16), OnGPU(torch.float64))
        assert problem("cuda") is None
    with using("triton"), pytest.raises(RuntimeError, match=r"no kernels for torch\.float64"):
        choose("rms_norm", OnGPU(torch.float64))
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with using("auto"):
        with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET is set, .*: unset it"):
            choose("rms_norm", OnGPU(torch.bfloat16))
        assert problem("cuda") == "TRITON_INTERPRET is set, which emulates kernels on the CPU: unset it"


def test_problem_names_who_asked(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with using({"rope": "triton", "swiglu": "torch"}):
        assert problem("cpu") == (
            "triton cannot run: on a CPU it needs TRITON_INTERPRET=1, which emulates it slowly; "
            "or take auto or torch for rope"
        )
    with using("auto"):
        assert problem("cpu") is None


def test_each_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    dispatch._log_once.cache_clear()
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with caplog.at_level(logging.INFO, "megalite.kernels"), using("auto"):
        for _ in range(2):
            choose("rope", torch.ones(1))
            choose("swiglu", torch.ones(1))
        with using("torch"):
            choose("rope", torch.ones(1))
    reason = "on a CPU it needs TRITON_INTERPRET=1, which emulates it slowly"
    assert caplog.messages == [
        f"rope on cpu: torch ({reason})",
        f"swiglu on cpu: torch ({reason})",
        "rope on cpu: torch (asked for)",
    ]


def test_without_triton():
    """In a process that cannot import it: everything imports, runs in torch, and says so when asked for more."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from megalite import kernels
assert not kernels.dispatch.INSTALLED
x = torch.ones(2, 4, requires_grad=True)
kernels.swiglu(kernels.rms_norm(x, torch.ones(4)), x).sum().backward()
kernels.use("triton")
try:
    kernels.swiglu(x, x)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("swiglu: triton cannot run: it is not installed ("), done.stderr
    assert "pip install triton; or take auto or torch (model.kernels)" in done.stdout


# The interpreter's bf16


@triton.jit
def _copy_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def _double_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(y + at, value + value)


@triton.jit
def _sum_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16])
def test_casts_to_bf16_round_like_torch(device, source):
    x = draw(1024, device=device).detach()
    x[:8] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 6e4])
    x = x.to(source)
    y = torch.empty(1024, dtype=torch.bfloat16, device=device)
    _copy_kernel[(1,)](x, y, BLOCK=1024)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[3:], x.signbit()[3:])
    back = torch.empty(1024, dtype=source, device=device)
    _copy_kernel[(1,)](y, back, BLOCK=1024)
    torch.testing.assert_close(back, y.to(source), rtol=0, atol=0, equal_nan=True)


@IN_INTERPRETER
@pytest.mark.parametrize("kernel", [_double_kernel, _sum_kernel], ids=["add", "sum"])
def test_arithmetic_on_bf16_is_an_error(kernel):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="bf16: convert to fp32 first"):
        kernel[(1,)](x, torch.empty(16, dtype=torch.bfloat16), BLOCK=16)


# The model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_model_with_kernels_is_the_model_without(device, checkpointing):
    tokens, labels, mask = (x.to(device) for x in make_batch(s=6))
    results = []
    for setting in (dict.fromkeys(MINE, "torch"), MINE):
        stage = make_stage(num_kv_heads=2, qk_norm=True, activation_checkpointing=checkpointing).to(device)
        with using(setting | dict.fromkeys(dispatch.OPERATORS - MINE.keys(), "torch")):
            results.append(loss_and_gradients(stage, tokens, labels, mask))
    (want, wanted), (got, gotten) = results
    # Two layers of fp32, whose sums are in another order.
    torch.testing.assert_close(got, want, rtol=100 * ROUNDING[torch.float32], atol=0)
    for name, gradient in gotten.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)
