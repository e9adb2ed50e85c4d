"""The model's fused operators, imported as `megalite.kernels`. Nothing here imports the rest of megalite.

Each file holds one operator with its public function; today each is the torch reference, and a Triton kernel of the
same signature is to stand beside it. Shapes in this folder: `...` any leading dimensions, `h` hidden, `n` heads,
`d` head size, `s` sequence, `b` batch, `v` vocabulary, `v/tp` this rank's part of it.
"""

from megalite.kernels.cross_entropy import cross_entropy
from megalite.kernels.rms_norm import rms_norm
from megalite.kernels.rope import rope
from megalite.kernels.swiglu import swiglu

__all__ = ["cross_entropy", "rms_norm", "rope", "swiglu"]
