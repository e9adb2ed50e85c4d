"""Tests of the Triton kernels. Importing anything from here, in this process or another, settles how they run.

On a GPU they are compiled. Elsewhere they run in Triton's interpreter, which has to be asked for before Triton is
imported; one process cannot do both.
"""

import importlib.util
import os

import torch

INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]  # the processes that tests start run kernels as a user's do

    from tests.kernels import interpreter

    interpreter.patch()
