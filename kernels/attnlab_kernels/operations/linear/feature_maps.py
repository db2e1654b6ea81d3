"""Feature maps of linear attention: ``phi(q) . phi(k)`` stands for the similarity of q and k.

elu + 1: Katharopoulos et al., https://arxiv.org/abs/2006.16236. Positive random features (FAVOR+): Choromanski et
al., "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

FEATURE_MAPS = ("elu", "relu", "softmax_kernel", "identity")


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``, above 0; written so that a very negative x keeps its size (it is ``exp(x)``)."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``: similarities may be 0, and a query may see nothing."""
    return functional.relu(x)


def identity(x: Tensor) -> Tensor:
    """``x d^(-1/4)``, so that ``phi(q) . phi(k) = q . k / sqrt(d)``. May be negative: not to be normalised."""
    return x * x.shape[-1] ** -0.25


def favor(x: Tensor, projection: Tensor, *, stabilise: Literal["row", "all", "none"]) -> Tensor:
    """Positive random features whose expected product is ``exp(q . k / sqrt(d))``.

    ``f^(-1/2) exp(w . x' - |x'|^2 / 2)`` with ``x' = x d^(-1/4)``.

    Args:
        x: ``[B, H, n, d]``.
        projection: rows w ``[f, d]``, standard normal each.
        stabilise: factor that the normalisation cancels: "row" one for each token, exact for queries; "all" one for
            all tokens of a head, exact for keys that are all there (not when causal: a late key would change early
            rows); "none".

    Returns:
        float32 or float64 ``[B, H, n, f]``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scaled = x.to(wide) * x.shape[-1] ** -0.25
    exponent = scaled @ projection.to(wide).T - scaled.square().sum(dim=-1, keepdim=True) / 2
    if stabilise != "none" and exponent.numel():
        dims = (-1,) if stabilise == "row" else (-1, -2)
        exponent = exponent - exponent.detach().amax(dim=dims, keepdim=True)
    return torch.exp(exponent) * projection.shape[0] ** -0.5


def default_features(dim: int) -> int:
    """``floor(d ln d)`` random features, at least 1."""
    return max(1, int(dim * math.log(dim)))


def draw_projection(
    features: int, dim: int, *, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random rows ``[features, dim]``, each standard normal; orthogonal inside each block of ``dim`` rows.

    Orthogonal rows lower the variance of the estimate; their lengths are those of independent normal vectors.
    """
    normal = torch.randn(features, dim, generator=generator)
    if not orthogonal:
        return normal
    blocks = []
    for _ in range(0, features, dim):
        basis, upper = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        # with these signs every rotation is equally likely
        blocks.append((basis * torch.sign(torch.diagonal(upper))).T)
    return torch.cat(blocks)[:features] * normal.norm(dim=1, keepdim=True)
