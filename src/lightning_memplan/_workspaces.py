"""What cuDNN's convolutions take beside their operands, as a function of sizes: an allowance with a range, no figure.

Which algorithm runs is cuDNN's choice (by its heuristics, or by trying all that fit with ``cudnn.benchmark``) and
differs between cards and versions. torch takes the workspace from the caching allocator and gives it back when the
convolution returns. So each convolution has a range: the least that some algorithm needs, what the usual one takes, and
what the hungriest of the common ones takes. Where a workspace does not fit, torch tries the next algorithm
(aten/src/ATen/native/cudnn/Conv_v7.cpp ``AlgoIterator::try_all``, Conv_v8.cpp ``try_plans``): a large one makes a run
slow before it makes it fail.
"""

from __future__ import annotations

from typing import Literal

from lightning_memplan._types import Range

Choice = Literal["low", "expected", "high"]


def _up(a: int, b: int) -> int:
    return -(-a // b) * b


def transposed(n: int, c: int, k: int, pixels: int, results: int, taps: int, groups: int, width: int) -> int:
    """Copies of input, result and filter with channels last.

    Tensor cores' convolution kernels work on channels-last operands. Given channels-first ones, cuDNN converts each
    within the workspace (kernels ``nchwToNhwcKernel`` and ``nhwcToNchwKernel``). In two bytes, channels are filled up
    to a multiple of 8, in four (TF32) of 4: a tensor core's vector is 16 bytes.

    The first convolution of a ResNet, 256 images in float16: 256 · 2 · (8 · 224² + 64 · 112²) + 2 · 64 · 8 · 7².

    >>> transposed(n=256, c=3, k=64, pixels=224**2, results=112**2, taps=7**2, groups=1, width=2)
    616612864

    Source: NVIDIA, "Convolutional Layers User's Guide" (tensor layouts; channels in and out), DU-09796-001.
    """
    if groups == 1:
        c, k = _up(c, 16 // width), _up(k, 16 // width)
    return width * (n * (c * pixels + k * results) + k * (c // groups) * taps)


def winograd(n: int, c: int, k: int, tiles: int) -> int:
    """The transformed operands of Winograd's F(4×4, 3×3), in float32: 36 values for a tile of 16, for 9 of a filter.

    64 channels to 64 on 56×56, one image: 4 · 36 · (14² · 128 + 64²).

    >>> winograd(n=1, c=64, k=64, tiles=14**2)
    4202496

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.3; cuDNN's
    ``CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED`` ("significant workspace may be needed").
    """
    return 4 * 36 * (n * tiles * (c + k) + c * k)


def convolution(
    n: int, c: int, k: int, pixels: int, results: int, taps: int, tiles: int, groups: int, width: int, moved: int
) -> Range:
    """The workspace of a convolution in one, two or three dimensions, or of either of its gradients.

    ``n`` samples of ``c`` channels on ``pixels`` places become ``k`` channels on ``results``, by filters of ``taps``
    places. ``tiles`` of 4×4 hold a sample's results, 0 where the filter is not Winograd's (3×3, stride 1).
    ``width`` is bytes of an element; ``moved`` says whether the operands must be laid out anew: they have channels
    first, and tensor cores compute.

    A gradient is a convolution of the same operands, and so is a transposed convolution: they have the same.

    * low: 0, of the implicit GEMM that precomputes nothing.
    * expected: the copies where operands are moved and there are no groups, else 0.
    * high: the most of those copies, of a grouped convolution's, and of Winograd's transforms.

    Depthwise convolutions have kernels of their own, without a workspace.

    >>> convolution(1, 64, 64, 56**2, 56**2, 9, tiles=14**2, groups=1, width=2, moved=1)
    Range(low=0, expected=876544, high=4202496)
    >>> convolution(1, 64, 64, 56**2, 56**2, 9, tiles=0, groups=1, width=2, moved=0).expected
    0
    """
    if groups > 1 and groups in (c, k):
        return Range(0, 0, 0)
    copies = transposed(n, c, k, pixels, results, taps, groups, width) if moved else 0
    transforms = winograd(n, c, k, tiles) if tiles and groups == 1 else 0
    return Range(0, copies if groups == 1 else 0, max(copies, transforms))
