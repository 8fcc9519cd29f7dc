"""The generalised pooling operator: learned weights for the k-th largest value of each feature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from goal import validation
from goal.models.sets import at_least_float32, features


class GPO(nn.Module):
    """Pools a set of any size into one vector, with weights over the sorted values of each feature.

        f_d = Σₖ θ(k, N) · (k-th largest of v₁d … v_Nd),    k = 0 … N − 1
        θ(·, N) = softmaxₖ(w · h_k / t),  h = BiGRU(p₀ … p_{N−1}) averaged over its directions
        p_k = (sin ω₀k, cos ω₀k, sin ω₁k, …),  ωᵢ = 10000^(−2i/code)

    θ depends on the size N alone: 1/N at each k is the mean, 1 at k = 0 is the maximum.

    Args:
        code: dimensions of the position codes p, even.
        hidden: width of the BiGRU.
        temperature: t > 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from goal.models import GPO
        >>> pool = GPO()
        >>> pool(torch.randn(4, 36, 8)).shape
        torch.Size([4, 8])
        >>> pool.weights(torch.tensor([2, 3])).sum(1).allclose(torch.ones(2))
        True

    Source: Chen et al., "Learning the best pooling strategy for visual semantic embedding", CVPR 2021, §3.2. The
    defaults are those of its released code.
    """

    def __init__(self, code: int = 32, hidden: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        if code < 2 or code % 2:
            raise ValueError(f"code must be even and at least 2, got {code}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}.")
        code, hidden = validation.whole_number("code", code), validation.whole_number("hidden", hidden)
        self.code, self.temperature = code, temperature
        self.gru = nn.GRU(code, hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, D) values, (N, L) bool mask (True is real; None: all are) to (N, D), float32 or float64.

        Raises:
            ValueError: another shape, or a set without a real element.
        """
        width = values.shape[-1] if isinstance(values, Tensor) and values.dim() else 0
        values = features("values", values, "(N, L, D)", width)
        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        if mask.dtype != torch.bool or mask.shape != values.shape[:2]:
            wanted = tuple(values.shape[:2])
            raise ValueError(f"mask must be {wanted} bool, got {tuple(mask.shape)} {mask.dtype}.")
        sizes, which = mask.sum(1).unique(return_inverse=True)
        if int(sizes[0]) == 0:
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"mask: set {row} has no real element, and nothing can be pooled from none.")
        theta = self.weights(sizes)  # (sizes, K)
        ordered = values.masked_fill(~mask[..., None], -torch.inf).sort(1, descending=True).values[:, : theta.shape[1]]
        places = torch.arange(theta.shape[1], device=values.device) < sizes[which][:, None]  # (N, K)
        ordered = at_least_float32(ordered.masked_fill(~places[..., None], 0))
        return (theta.index_select(0, which)[..., None] * ordered).sum(1)

    def weights(self, sizes: Tensor) -> Tensor:
        """θ(k, N) for set sizes N (S,) ≥ 1: (S, K) with K the largest of them; 0 at k ≥ N, float32 or float64."""
        longest = int(sizes.max())
        k = torch.arange(longest, device=sizes.device)
        even = at_least_float32(torch.arange(0, self.code, 2, device=sizes.device).to(self.score.weight.dtype))
        omega = torch.exp(even * (-math.log(1e4) / self.code))
        angles = k[:, None] * omega  # (K, code / 2)
        codes = torch.stack((angles.sin(), angles.cos()), 2).flatten(1).to(self.score.weight.dtype)  # (K, code)
        packed = pack_padded_sequence(
            codes.expand(len(sizes), -1, -1), sizes.cpu(), batch_first=True, enforce_sorted=False
        )
        both, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)  # (S, K, 2 hidden)
        scores = at_least_float32(self.score(both.unflatten(2, (2, -1)).mean(2)).squeeze(2))
        return (scores / self.temperature).masked_fill(k >= sizes[:, None], -torch.inf).softmax(1)
