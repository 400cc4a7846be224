"""The portable kernels' softcap alone, as a kernel over numbers."""

import triton
import triton.language as tl

from ringflash.kernels.portable_parts import LOG2_E, softcap

CAP_SCALE = 2 * LOG2_E  # of scale 1 and softcap 1


@triton.jit
def cap_kernel(x, tanh, slope, cap_scale, BLOCK: tl.constexpr):
    """tanh x and its derivative of BLOCK numbers."""
    at = tl.arange(0, BLOCK)
    t, d = softcap(tl.load(x + at), cap_scale)
    tl.store(tanh + at, t)
    tl.store(slope + at, d)
