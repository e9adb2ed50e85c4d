"""Which operators run as Triton kernels and which in plain torch, and what both need to stand in one file.

Kernels take Triton from here (`from megalite.kernels.dispatch import tl, triton`), so that their files can be imported
where it isn't installed. The choice is process-wide (`use`), made from the config's `model.kernels`; `auto` takes
Triton on a GPU, torch on a CPU, and on a CPU with TRITON_INTERPRET=1 in the environment Triton's interpreter, which
runs the same kernels in numpy, slowly, for tests.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    _IMPORT_ERROR = str(error)
    # What a file of kernels needs to be imported. Nothing of it runs: `choose` says torch.
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=None)
else:
    _IMPORT_ERROR = None
INSTALLED = _IMPORT_ERROR is None
# Triton looks at TRITON_INTERPRET when a kernel is decorated: from then on the choice is fixed.
INTERPRETED: bool = INSTALLED and bool(triton.knobs.runtime.interpret)

OPERATORS = ("cross_entropy", "linear_cross_entropy", "rms_norm", "rope", "softmax", "swiglu")
CHOICES = ("auto", "triton", "torch")
# Elementwise: torch.compile fuses them with their neighbours, which saves more than a kernel of its own can.
_LEFT_TO_COMPILE = ("rope", "swiglu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_log = logging.getLogger("megalite.kernels")
_choices = dict.fromkeys(OPERATORS, "auto")


def use(setting: str | dict[str, str]) -> None:
    """Set the choice of every operator in this process: auto, triton or torch, or {operator: choice}, others auto.

    Raises ValueError, which names what there is, for an unknown operator or choice.
    """
    chosen = setting if isinstance(setting, dict) else dict.fromkeys(OPERATORS, setting)
    for op, choice in chosen.items():
        if op not in OPERATORS:
            raise ValueError(f"no kernel is called {op!r}; there are {', '.join(OPERATORS)}")
        if choice not in CHOICES:
            raise ValueError(f"{op}: {choice!r} is none of {', '.join(CHOICES)}")
    _choices.update(dict.fromkeys(OPERATORS, "auto") | chosen)


@contextmanager
def using(setting: str | dict[str, str]) -> Iterator[None]:
    """`use` for the length of a with statement."""
    before = dict(_choices)
    use(setting)
    try:
        yield
    finally:
        _choices.update(before)


def problem(device: str) -> str | None:
    """Why the present choices cannot be followed on this type of device, and what to do about it; None if they can."""
    hindrance = _no_triton(device)
    asked = [op for op, choice in _choices.items() if choice == "triton"]
    if hindrance is None or not (asked or (INTERPRETED and device == "cuda")):
        return None
    return f"triton cannot run: {hindrance}; or take auto or torch for {', '.join(asked)}" if asked else hindrance


def choose(op: str, *tensors: Tensor | None) -> bool:
    """Whether `op` on these tensors runs in Triton (True) or torch (False).

    Logs each choice once, with its reason. Raises RuntimeError where Triton was asked for by name and cannot run, or
    where TRITON_INTERPRET would emulate a GPU's kernels.
    """
    choice = _choices[op]
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device.type
    compiling = torch.compiler.is_compiling()
    if choice == "torch":
        triton_runs, reason = False, "asked for"
    elif choice == "auto" and compiling and op in _LEFT_TO_COMPILE:
        return False
    else:
        hindrance = _no_triton(device) or _bad_dtype(given)
        if hindrance is not None and (choice == "triton" or (INTERPRETED and device == "cuda")):
            raise RuntimeError(f"{op}: triton cannot run: {hindrance}; or take auto or torch (model.kernels)")
        triton_runs = hindrance is None
        reason = hindrance or ("asked for" if choice == "triton" else f"{device} tensors")
    if not compiling:  # a graph has no place for it
        _log_once(op, device, triton_runs, reason)
    return triton_runs


def operator(name: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels: plain when called eagerly, megalite::`name` under torch.compile.

    Going through a registered operator costs 20 us a call more than calling the function. `fake` is the same without
    the arithmetic: empty tensors of the results' shapes. The function may not return its inputs, nor views of them,
    nor write into them; its first argument is a tensor. `.registered` of what this gives is the operator.
    """

    def decorate(launch: Callable) -> Callable:
        launch = on_its_device(launch)
        registered = torch.library.custom_op(f"megalite::{name}", launch, mutates_args=())
        registered.register_fake(fake)

        @functools.wraps(launch)
        def call(*args):
            return registered(*args) if torch.compiler.is_compiling() else launch(*args)

        call.registered = registered
        return call

    return decorate


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless `tensor` is of the shape that the others ask for: where torch would broadcast it, or say what
    is wrong, a kernel reads what lies behind it."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, and the others ask for {list(shape)}")


def on_its_device(launch: Callable) -> Callable:
    """Decorates a function that launches kernels: on its first argument's GPU. Triton itself takes the current one."""

    @functools.wraps(launch)
    def call(first: Tensor, *args):
        with torch.cuda.device_of(first):
            return launch(first, *args)

    return call


def rows(x: Tensor) -> Tensor:
    """[..., h] -> [rows, h] with neighbours in a row next to each other: a view where strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _no_triton(device: str) -> str | None:
    if not INSTALLED:
        return f"it is not installed ({_IMPORT_ERROR}): pip install triton"
    if device == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set, which emulates kernels on the CPU: unset it"
    if device == "cpu" and not INTERPRETED:
        return "on a CPU it needs TRITON_INTERPRET=1, which emulates it slowly"
    return None if device in ("cpu", "cuda") else f"there are no kernels for {device}"


def _bad_dtype(tensors: list[Tensor]) -> str | None:
    """fp64 is for the interpreter, where gradcheck wants it: on a GPU it would be slow and is not tested."""
    allowed = (*_DTYPES, torch.float64) if INTERPRETED else _DTYPES
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in allowed:
            return f"there are no kernels for {tensor.dtype}"
    return None


@functools.cache
def _log_once(op: str, device: str, triton_runs: bool, reason: str) -> None:
    _log.info("%s on %s: %s (%s)", op, device, "triton" if triton_runs else "torch", reason)
