"""Heads for labelled audio and visual features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goal import validation
from goal.models import sets


class AudioVisual(nn.Module):
    """Audio and visual feature vectors into one space, L2-normalised; a head for each side.

        z = (v − c) / σ;   e = W₂ dropout(relu(W₁ z + b₁)) + b₂;   x = e / ‖e‖

    Row k of both is one clip; clips of one class are no negatives of each other, so the labels are the objective's ids.
    c and σ are 0 and 1 until `standardise` takes them from the training split.

    Args:
        d_audio: dimensions of the audio features; 128 of VGGish, as AVE and VEGAS are used.
        d_visual: dimensions of the visual features; 1024 of Inception.
        hidden: width of the hidden layers.
        dim: of the joint space.
        dropout: share of hidden units dropped in training.

    Example:
        >>> import goal, torch
        >>> from goal.models import AudioVisual
        >>> model = AudioVisual(hidden=32, dim=16)
        >>> x, y = model(torch.randn(6, 128), torch.randn(6, 1024))
        >>> goal.apply(x, y, mining="semi-hard", ids=torch.tensor([0, 0, 1, 1, 2, 2])).backward()

    Source: ours; two-layer heads are the common baseline of audio-visual retrieval on these features.
    """

    def __init__(
        self, d_audio: int = 128, d_visual: int = 1024, hidden: int = 1024, dim: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sets.share("dropout", dropout)
        self.audio, self.visual = (_Head(d_in, hidden, dim, dropout) for d_in in (d_audio, d_visual))

    def standardise(self, audio: Tensor, visual: Tensor) -> None:
        """Take c and σ from the (N, d_audio) and (N, d_visual) features of the training split; σ = 1 for constants.

        Raises:
            TypeError, ValueError: another dtype or shape, or a column whose c or σ is not finite.
        """
        for name, head, values in (("audio", self.audio, audio), ("visual", self.visual, visual)):
            values = sets.features(name, values, "(N, D)", len(head.centre))
            centre, deviation = (v.to(head.centre.dtype) for v in (values.mean(0), values.std(0, correction=0)))
            bad = ~(centre.isfinite() & deviation.isfinite())
            if bool(bad.any()):
                column = int(bad.nonzero()[0])
                raise ValueError(f"{name}: column {column} has no finite mean and deviation in {centre.dtype}.")
            head.centre.copy_(centre)
            head.deviation.copy_(deviation.masked_fill(deviation == 0, 1))

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d_audio) and (M, d_visual) features to x (N, dim) and y (M, dim), float32 or float64.

        Raises:
            TypeError, ValueError: for another dtype or shape.
        """
        return self.embed_x(audio), self.embed_y(visual)

    def embed_x(self, audio: Tensor) -> Tensor:
        """(N, d_audio) to x (N, dim)."""
        return sets.unit(self.audio(sets.features("audio", audio, "(N, D)", len(self.audio.centre))))

    def embed_y(self, visual: Tensor) -> Tensor:
        """(M, d_visual) to y (M, dim)."""
        return sets.unit(self.visual(sets.features("visual", visual, "(M, D)", len(self.visual.centre))))


class _Head(nn.Module):
    """(n, d_in) features to (n, dim), not normalised yet."""

    centre: Tensor  # (d_in,) c
    deviation: Tensor  # (d_in,) σ

    def __init__(self, d_in: int, hidden: int, dim: int, dropout: float) -> None:
        super().__init__()
        d_in, hidden, dim = (
            validation.whole_number(name, value) for name, value in (("d_in", d_in), ("hidden", hidden), ("dim", dim))
        )
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("deviation", torch.ones(d_in))
        self.layers = nn.Sequential(nn.Linear(d_in, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, values: Tensor) -> Tensor:
        e: Tensor = self.layers((values.to(self.centre.dtype) - self.centre) / self.deviation)
        return e
