"""Two small heads that map frozen features of images and of captions into a common space."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, normalize


class Head(nn.Module):
    """Frozen features to embeddings: centred, scaled, one hidden layer.

        z = √D (v − c) / ‖v − c‖;   e = W₂ dropout(gelu(W₁ z + b₁)) + b₂;   e / ‖e‖, or |e| / √dim

    Pooled features have a large common part c, the mean of the training split; left in, all similarities begin near 1
    and mined objectives first spend hundreds of steps on getting away from there.

    Args:
        d_in: dimensions D of the features.
        hidden: width of the hidden layer.
        dim: dimensions of the embedding.
        dropout: share of hidden units dropped in training.
        unit: L2-normalised embeddings; else |e| / √dim, not normalised, as order embeddings are; the root keeps their
            distances, and so the meaning of a margin, the same at every width.

    >>> head = Head(d_in=6, hidden=8, dim=4, dropout=0.3, unit=True).eval()
    >>> head(torch.randn(5, 6)).norm(dim=1).allclose(torch.ones(5))
    True
    """

    centre: Tensor  # (d_in,) mean of the training split's features

    def __init__(self, d_in: int, hidden: int, dim: int, dropout: float, unit: bool) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(d_in))
        self.inner = nn.Linear(d_in, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.dropout = dropout
        self.unit = unit

    def forward(self, features: Tensor) -> Tensor:
        """(n, d_in) features to (n, dim) embeddings, float32."""
        return self.embed(self.scale(features))

    def scale(self, features: Tensor) -> Tensor:
        """(n, d_in) features v to z; nothing in it is learned, so training does it once."""
        return math.sqrt(features.shape[1]) * normalize(features - self.centre, dim=1)

    def embed(self, z: Tensor) -> Tensor:
        """(n, d_in) scaled features z to (n, dim) embeddings."""
        e = self.outer(dropout(gelu(self.inner(z)), self.dropout, self.training)).float()
        return normalize(e, dim=1) if self.unit else e.abs() / e.shape[1] ** 0.5


class Heads(nn.Module):
    """A head for each modality; arguments as for `Head`.

    >>> heads = Heads(6, 3, hidden=8, dim=4, dropout=0.3, unit=True)
    >>> x, y = heads(torch.randn(5, 6), torch.randn(5, 3))
    """

    def __init__(self, d_x: int, d_y: int, *, hidden: int, dim: int, dropout: float, unit: bool) -> None:
        super().__init__()
        self.x = Head(d_x, hidden, dim, dropout, unit)
        self.y = Head(d_y, hidden, dim, dropout, unit)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d_x) and (m, d_y) features to (n, dim) and (m, dim) embeddings."""
        return self.x(x), self.y(y)

    def embed_x(self, z: Tensor) -> Tensor:
        """(n, d_x) scaled features to (n, dim)."""
        return self.x.embed(z)

    def embed_y(self, z: Tensor) -> Tensor:
        """(m, d_y) scaled features to (m, dim)."""
        return self.y.embed(z)
