"""Encoders of features, for items with a single vector or with a set of regions."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from goal import validation
from goal.models import sets
from goal.models.pooling import GPO


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A linear layer with Xavier's uniform weights and bias 0, as the systems here begin."""
    layer = nn.Linear(validation.whole_number("d_in", d_in), validation.whole_number("dim", d_out))
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Projection(nn.Module):
    """One vector an item, projected: e = W v + b. VSE++'s images; as well, sentence features.

    Args:
        d_in: dimensions of the features.
        dim: of the joint space.

    Example:
        >>> import torch
        >>> from goal.models import Projection
        >>> Projection(2048, dim=64)(torch.randn(5, 2048)).shape
        torch.Size([5, 64])

    Source: Faghri et al., VSE++, BMVC 2018, §3; its release expects L2-normalised features.
    """

    def __init__(self, d_in: int, dim: int = 1024) -> None:
        super().__init__()
        self.fc = linear(d_in, dim)
        self.d_in = self.fc.in_features

    def forward(self, values: Tensor, lengths: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """(N, d_in) to (N, dim). Nothing is drawn from `generator`.

        Raises:
            ValueError: another shape, or lengths, which single vectors do not have.
            TypeError: no floating-point tensor.
        """
        if lengths is not None:
            raise ValueError("lengths: a Projection takes one vector an item; RegionImage and TokenText take sets.")
        values = sets.features("values", values, "(N, D)", self.d_in)
        projected: Tensor = self.fc(values.to(self.fc.weight.dtype))
        return projected


class RegionImage(nn.Module):
    """Region features to one vector: a linear layer, a residual MLP, the generalised pooling operator.

        residual="input":      f = fc(v) + MLP(v)              (VSE∞)
        residual="projected":  g = fc(v);  f = g + MLP(g)      (RVSE++)
        e = GPO(f over the regions),   MLP = linear → batch norm → ReLU → linear, hidden width dim / 2

    Padded regions are never looked at; batch norm's statistics are over the real ones.

    Args:
        d_in: dimensions of a region's features.
        dim: of the joint space.
        residual: where the MLP begins, `input` or `projected`.
        drop: share of the regions left out in training (size augmentation), each by its own draw.

    Raises:
        ValueError: an unknown residual, a share outside [0, 1).

    Example:
        >>> import torch
        >>> from goal.models import RegionImage
        >>> encoder = RegionImage(2048, dim=64, residual="projected").eval()
        >>> encoder(torch.randn(2, 36, 2048), lengths=torch.tensor([36, 20])).shape
        torch.Size([2, 64])

    Source: Chen et al., CVPR 2021, §3 and its release; Li et al., "Selectively hard negative mining for alleviating
    gradient vanishing in image-text matching" (RVSE++, T-SelHN), and its release.
    """

    def __init__(self, d_in: int = 2048, dim: int = 1024, residual: str = "input", drop: float = 0.2) -> None:
        super().__init__()
        if residual not in ("input", "projected"):
            raise ValueError(f"residual must be 'input' (VSE∞) or 'projected' (RVSE++), got {residual!r}.")
        self.fc = linear(d_in, validation.whole_number("dim", dim, least=2))  # the MLP's hidden width is half of it
        d_in, dim = self.fc.in_features, self.fc.out_features
        self.d_in, self.residual, self.drop = d_in, residual, sets.share("drop", drop)
        self.mlp = nn.Sequential(
            nn.Linear(d_in if residual == "input" else dim, dim // 2),
            nn.BatchNorm1d(dim // 2),
            nn.ReLU(),
            nn.Linear(dim // 2, dim),
        )
        self.pool = GPO()

    def forward(self, values: Tensor, lengths: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """(N, R, d_in) regions, the first lengths[n] of each real (None: all are), to (N, dim).

        Args:
            values: cast to the weights' dtype; what is padded may hold anything, NaN too.
            lengths: (N,) integers in 1 … R.
            generator: what decides in training which regions are dropped; by default torch's own.

        Raises:
            TypeError, ValueError: for another shape or dtype, or a length out of range.
        """
        values = sets.features("values", values, "(N, R, D)", self.d_in)
        mask = sets.mask_of("lengths", lengths, values)
        if self.training and self.drop:
            mask = sets.thinned(mask, self.drop, generator)
        v = sets.pack(values, mask).to(self.fc.weight.dtype)  # (real regions, d_in)
        g = self.fc(v)
        f = g + self.mlp(v if self.residual == "input" else g)
        pooled: Tensor = self.pool(sets.unpack(f, mask), mask)
        return pooled
