"""The model's fused operators, imported as `megalite.kernels`. Nothing here imports the rest of megalite.

Each file holds one operator: the torch reference, the Triton kernels, what binds them to autograd, and the public
function, which asks `dispatch` which of the two runs. Shapes in this folder: `...` any leading dimensions, `h` hidden,
`n` heads, `d` head size, `s` sequence, `b` batch, `v` vocabulary, `v/tp` this rank's part of it.
"""

from megalite.kernels.cross_entropy import cross_entropy
from megalite.kernels.dispatch import problem, use, using
from megalite.kernels.linear import linear
from megalite.kernels.linear_cross_entropy import linear_cross_entropy
from megalite.kernels.rms_norm import rms_norm
from megalite.kernels.rope import rope
from megalite.kernels.softmax import softmax
from megalite.kernels.swiglu import swiglu, swiglu_packed

__all__ = [
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "problem",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "swiglu_packed",
    "use",
    "using",
]
