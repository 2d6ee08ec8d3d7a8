"""What cuDNN's convolutions take beside their operands, as a function of sizes: an allowance, not a figure.

Which algorithm runs is cuDNN's choice (by its heuristics, or by trying all that fit with ``cudnn.benchmark``) and
differs between cards and versions; torch takes the workspace from the caching allocator and gives it back when the
convolution returns. So each convolution has a range: the least that some algorithm needs, what the usual one takes, and
what the hungriest of the common ones takes. Where a workspace does not fit, torch tries the next algorithm
(aten/src/ATen/native/cudnn/Conv_v7.cpp ``AlgoIterator::try_all``, Conv_v8.cpp ``try_plans``), so one that is large does
not by itself make a run fail.
"""

from __future__ import annotations

from typing import NamedTuple


class Workspace(NamedTuple):
    """Bytes of one convolution's workspace.

    >>> Workspace(low=0, expected=512, high=1024).expected
    512
    """

    low: int
    expected: int
    high: int


def _up(a: int, b: int) -> int:
    return -(-a // b)


def transposed(
    n: int, c: int, h: int, w: int, k: int, r: int, s: int, p: int, q: int, width: int, groups: int = 1
) -> int:
    """Copies of input, result and filter with channels last.

    Tensor cores' convolution kernels work on channels-last operands. Given channels-first ones, cuDNN converts each
    within the workspace (kernels ``nchwToNhwcKernel`` and ``nhwcToNchwKernel``). In two bytes, channels are filled up
    to a multiple of 8, in four (TF32) of 4: a tensor core's vector is 16 bytes.

    The first convolution of a ResNet, 256 images in float16: 256 · 2 · (8 · 224² + 64 · 112²) + 2 · 64 · 8 · 7².

    >>> transposed(n=256, c=3, h=224, w=224, k=64, r=7, s=7, p=112, q=112, width=2)
    616612864

    Source: NVIDIA, "Convolutional Layers User's Guide" (tensor layouts; channels in and out), DU-09796-001.
    """
    lanes = max(1, 16 // width)
    if groups == 1:
        c, k = _up(c, lanes) * lanes, _up(k, lanes) * lanes
    return width * (n * (c * h * w + k * p * q) + k * (c // groups) * r * s)


def winograd(n: int, c: int, k: int, p: int, q: int) -> int:
    """The transformed operands of Winograd's F(4×4, 3×3), in float32: 36 values for a tile of 16, for 9 of a filter.

    64 channels to 64 on 56×56, one image: 4 · 36 · (14² · 128 + 64²).

    >>> winograd(n=1, c=64, k=64, p=56, q=56)
    4202496

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.3; cuDNN's
    ``CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED`` ("significant workspace may be needed").
    """
    return 4 * 36 * (n * _up(p, 4) * _up(q, 4) * (c + k) + c * k)


def convolution(
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    r: int,
    s: int,
    p: int,
    q: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    width: int = 4,
    channels_last: bool = False,
    tensor_cores: bool = True,
) -> Workspace:
    """The workspace of a convolution from ``n·c·h·w`` to ``n·k·p·q`` with ``k·(c / groups)·r·s`` weights.

    Its two gradients are convolutions of the same operands, and have the same. ``width`` is bytes of an element;
    ``tensor_cores`` whether they are used: in half precision, and in float32 where TF32 is allowed (torch's default
    for convolutions), on compute capability 8.0 and later.

    * low: 0, of the implicit GEMM that precomputes nothing.
    * expected: the transposes where an ungrouped convolution of channels-first tensors runs on tensor cores, else 0.
      Depthwise convolutions have kernels of torch's own, without a workspace.
    * high: the most of that, Winograd's transforms (3×3, stride 1), and a grouped convolution's transposes.

    >>> convolution(1, 64, 56, 56, 64, 3, 3, 56, 56, width=2)
    Workspace(low=0, expected=876544, high=4202496)
    >>> convolution(1, 64, 56, 56, 64, 3, 3, 56, 56, width=2, channels_last=True).expected
    0
    """
    depthwise = groups == c and groups > 1
    moved = (
        0 if channels_last or depthwise or not tensor_cores else transposed(n, c, h, w, k, r, s, p, q, width, groups)
    )
    expected = moved if groups == 1 else 0
    high = max(expected, moved)
    if (r, s, stride, dilation, groups) == (3, 3, 1, 1, 1):
        high = max(high, winograd(n, c, k, p, q))
    return Workspace(0, expected, high)
