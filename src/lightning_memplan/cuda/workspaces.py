"""The workspaces of cuDNN's convolutions as functions of sizes: a range for each, since the algorithm is not known.

cuDNN chooses the algorithm, by its heuristics, or by trying all that fit with ``cudnn.benchmark``; the choice differs
between GPUs and versions. torch takes the workspace from the caching allocator and gives it back when the convolution
returns. So each convolution has a range: the least that some algorithm needs, the bytes of the usual one, and those of
the largest of the common ones. Where a workspace does not fit, torch tries the next algorithm
(aten/src/ATen/native/cudnn/Conv_v7.cpp ``AlgoIterator::try_all``, Conv_v8.cpp ``try_plans``): a large workspace makes a
run slow before it makes it fail.

An installed cuDNN says which algorithm is the usual one (`cuda.cudnn`). The rules for the rest come from 393
convolutions of 21 networks at three batch sizes in seven combinations of type and layout, on an H200 with cuDNN 9.19
(``python -m benchmarks.accuracy.convolutions``): copies of the operands, to the byte, wherever a kernel
needs another layout, and partial sums of the filter's gradient.
"""

from __future__ import annotations

from math import prod
from typing import Literal

from lightning_memplan.cuda.cudnn import workspace
from lightning_memplan.cuda.cudnn_process import FILTER, FORWARD, INPUT, LAST, MOVED, PLAIN, Question
from lightning_memplan.types import Range

Choice = Literal["low", "expected", "high"]


def _up(a: int, b: int) -> int:
    return -(-a // b) * b


def transposed(n: int, c: int, k: int, pixels: int, results: int, taps: int, groups: int, width: int) -> int:
    """Return the bytes of copies of input, result and filter with channels last.

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
    filters = k * (c // groups) * taps if taps > 1 else 0  # of one place: the same in either layout
    return width * (n * (c * pixels + k * results) + filters)


def padded(n: int, c: int, k: int, pixels: int, results: int, width: int) -> int:
    """Return the bytes of copies of operands with channels last that are filled up to whole vectors of 16 bytes.

    30 channels of float16 to 64, one image: the input is copied with 32.

    >>> padded(n=1, c=30, k=64, pixels=100, results=100, width=2)
    6400
    """
    vector = 16 // width
    grown = ((c, pixels), (k, results))
    return width * n * sum(_up(channels, vector) * places for channels, places in grown if channels % vector)


def winograd(n: int, c: int, k: int, tiles: int) -> int:
    """Return the bytes of the transformed operands of Winograd's F(4×4, 3×3), in float32.

    A tile of 16 values has 36, and so has a filter of 9.

    64 channels to 64 on 56×56, one image: 4 · 36 · (14² · 128 + 64²).

    >>> winograd(n=1, c=64, k=64, tiles=14**2)
    4202496

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.3; cuDNN's
    ``CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED`` ("significant workspace may be needed").
    """
    return 4 * 36 * (n * tiles * (c + k) + c * k)


def convolution(
    part: int,
    n: int,
    c: int,
    k: int,
    pixels: int,
    results: int,
    taps: int,
    tiles: int,
    groups: int,
    width: int,
    layout: int,
) -> Range:
    """Return the workspace of a convolution in one, two or three dimensions, or of either of its gradients.

    ``part`` is FORWARD, INPUT or FILTER. ``n`` samples of ``c`` channels on ``pixels`` places become ``k`` channels on
    ``results``, by filters of ``taps`` places. ``tiles`` of 4×4 hold a sample's results, 0 where the filter is not
    Winograd's (3×3, stride 1). ``width`` is bytes of an element, ``layout`` PLAIN, MOVED or LAST. A transposed
    convolution is one of the same operands.

    * low: 0, of the implicit GEMM that precomputes nothing.
    * expected: as measured (see above).
    * high: the largest of all copies, Winograd's transforms and the partial sums. In float32 a filter's gradient may be
      computed in another layout than the operands', whichever it is: both were copied, to the byte, in one of eight.

    >>> convolution(FORWARD, 1, 64, 64, 56**2, 56**2, 9, tiles=14**2, groups=1, width=2, layout=MOVED)
    Range(low=0, expected=876544, high=4202496)
    >>> convolution(FORWARD, 1, 64, 64, 56**2, 56**2, 9, tiles=0, groups=1, width=2, layout=LAST).expected
    0
    """
    copies = transposed(n, c, k, pixels, results, taps, groups, width) if layout == MOVED else 0
    if layout == LAST and groups == 1:
        copies = padded(n, c, k, pixels, results, width)
    transforms = winograd(n, c, k, tiles) if tiles and groups == 1 else 0
    relaid = transposed(n, c, k, pixels, results, taps, groups, width) if (part, width) == (FILTER, 4) else 0
    if groups > 1 and groups in (c, k):
        usual = _depthwise(part, n, k, results, taps, layout)
        return Range(0, usual, max(usual, relaid))
    if layout == PLAIN:
        usual = transforms if part == FILTER else 0
    elif taps == 1 and pixels == results:
        usual = _pointwise(part, n, c, k, pixels, width, layout, copies)
    elif part == FORWARD and c < 4 and c * taps < 64:  # of an image, by a small filter: a kernel of its own
        usual = 0
    else:
        usual = copies
    return Range(0, usual, max(usual, copies, transforms, relaid))


def allowance(q: Question) -> Range:
    """Return the workspace of a recorded convolution by the rules.

    >>> allowance(Question(86, FORWARD, 2, 0, MOVED, 1, 64, 64, 1, *[(56, 56)] * 2, (3, 3), *[(1, 1)] * 3))
    Range(low=0, expected=876544, high=4202496)
    """
    winograds = q.kernel == (3, 3) and set(q.stride) == set(q.dilation) == {1}
    tiles = prod(-(-edge // 4) for edge in q.results) if winograds else 0
    sizes = prod(q.size), prod(q.results), prod(q.kernel), tiles
    return convolution(q.part, q.n, q.c, q.k, *sizes, q.groups, _WIDTHS[q.kind], q.layout)


def taken(choice: Choice, transposed: int, *numbers: int) -> int:
    """Return the bytes of a recorded convolution: by the rules, and as cuDNN says where it can be asked.

    ``numbers`` are those of a `Question`; ``transposed`` is 1 for a transposed convolution.

    >>> taken("low", 0, 86, FORWARD, 2, 0, MOVED, 1, 64, 64, 1, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1)
    0
    """
    if choice == "low":
        return 0
    recorded = Question.of(numbers)
    found, usual = allowance(recorded), _asked(recorded, transposed)
    if usual is None:
        return found.expected if choice == "expected" else found.high
    return usual if choice == "expected" else max(usual, found.high)


def is_pointwise(q: Question) -> bool:
    """Check for a convolution that is a product of matrices."""
    return set(q.kernel) == {1} and q.size == q.results and q.groups == 1


def _asked(q: Question, transposed: int) -> int | None:
    """Ask cuDNN; None for a convolution that it plans otherwise with a GPU (see `cuda.cudnn`), or that torch computes.

    torch has kernels for depthwise convolutions; with channels last and in float32 these are cuDNN's.
    """
    depthwise = q.groups > 1 and q.groups in (q.c, q.k)
    if q.layout == PLAIN or is_pointwise(q) or (depthwise and (q.layout, q.kind) != (LAST, 0)):
        return None
    if transposed:  # the gradient of a convolution the other way
        part = (INPUT, FORWARD, FILTER)[q.part]
        q = q._replace(part=part, c=q.k, k=q.c, size=q.results, results=q.size)
    return workspace(q)


_WIDTHS = {0: 4, 1: 8, 2: 2, 9: 2}  # bytes of a value, by cuDNN's number of its type


def _depthwise(part: int, n: int, k: int, results: int, taps: int, layout: int) -> int:
    """Return the bytes of the filter's gradient with channels last: up to 1,024 partial sums in float32; else 0."""
    return 4 * k * taps * min(1024, -(-n * results // 2)) if (part, layout) == (FILTER, LAST) else 0


def _pointwise(part: int, n: int, c: int, k: int, pixels: int, width: int, layout: int, copies: int) -> int:
    """Return the bytes of a product of matrices, which takes either layout if its rows are aligned.

    The filter's gradient is one product for each sample, in float32, added up.
    """
    vector = 16 // width
    if layout == LAST:
        return copies
    if pixels == 1 or c % vector or k % vector:
        return 0
    if pixels % 2:
        return copies
    return min(4 * n * c * k, copies) if part == FILTER else 0
