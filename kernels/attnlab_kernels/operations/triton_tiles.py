"""What our Triton kernels do with tiles: load and store rows, mask by a band, fold a softmax. Needs triton.

N rows of a tile, named by ``places`` int64 [N], are ``stride`` numbers apart and WIDTH numbers long, padded to BLOCK, a
power of two. Scores and running maxima are in powers of two. The compiler inlines every call.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl


@triton.jit
def load_rows(base, places, stride, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows as [N, BLOCK]; zeros, and nothing read, where ``exists`` [N] is false and from WIDTH on."""
    columns = tl.arange(0, BLOCK)
    inside = exists[:, None] & (columns[None, :] < WIDTH)
    return tl.load(base + places[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_columns(base, places, stride, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The same rows, transposed: [BLOCK, N]."""
    columns = tl.arange(0, BLOCK)
    inside = exists[None, :] & (columns[:, None] < WIDTH)
    return tl.load(base + places[None, :] * stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def store_rows(base, places, tile, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile [N, BLOCK] as contiguous rows of WIDTH numbers, in the type behind ``base``."""
    columns = tl.arange(0, BLOCK)
    inside = exists[:, None] & (columns[None, :] < WIDTH)
    tl.store(base + places[:, None] * WIDTH + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def within_band(keep, position, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """``keep`` without the pairs outside of the band; ``position`` and ``keys`` broadcast against each other."""
    if HAS_LEFT:
        keep = keep & (keys >= position - left)
    if HAS_RIGHT:
        keep = keep & (keys <= position + right)
    return keep


@triton.jit
def fold_maximum(row_max, row_sum, scores):
    """One tile of a softmax: (new maximum, new sum, weights [M, N], decay [M]); a forbidden score is minus infinity."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row that has seen no key yet: subtract 0, so that its exponentials are 0 and not NaN
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(scores - shift[:, None])
    decay = tl.math.exp2(row_max - shift)
    return new_max, row_sum * decay + tl.sum(weights, 1), weights, decay


@triton.jit
def fold_softmax(acc, row_max, row_sum, scores, v):
    """The same with its values [N, DV] folded into ``acc`` [M, DV], which is not divided by the sum yet."""
    row_max, row_sum, weights, decay = fold_maximum(row_max, row_sum, scores)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def close_softmax(row_max, row_sum):
    """(sum to divide by, natural log-sum-exp); of a dead row 1 and minus infinity."""
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    return row_sum, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453


@triton.jit
def load_lse(pointer, places, live):
    """A log-sum-exp [M] in powers of two; a dead row has weights of 2 ** (score - infinity)."""
    lse = tl.load(pointer + places, mask=live, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def weights_again(scores, lse, keep):
    """Probabilities from scores and ``load_lse``, broadcast against each other; 0 where not ``keep``."""
    return tl.where(keep, tl.math.exp2(scores - lse), 0.0)
