"""Heads for labelled audio and visual features."""

from __future__ import annotations

from torch import Tensor, nn

from goal.models import sets


class AudioVisual(nn.Module):
    """Audio and visual feature vectors into one space, L2-normalised; a head for each side.

        e = W₂ relu(W₁ v + b₁) + b₂;   x = e / ‖e‖

    Row k of both is one clip; clips of one class are no negatives of each other, so the labels are the objective's ids.

    Args:
        d_audio: dimensions of the audio features; 128 of VGGish, as AVE and VEGAS are used.
        d_visual: dimensions of the visual features; 1024 of Inception.
        hidden: width of the hidden layers.
        dim: of the joint space.

    Example:
        >>> import goal, torch
        >>> from goal.models import AudioVisual
        >>> model = AudioVisual(hidden=32, dim=16)
        >>> x, y = model(torch.randn(6, 128), torch.randn(6, 1024))
        >>> goal.apply(x, y, mining="semi-hard", ids=torch.tensor([0, 0, 1, 1, 2, 2])).backward()

    Source: ours; two-layer heads are the common baseline of audio-visual retrieval on these features.
    """

    def __init__(self, d_audio: int = 128, d_visual: int = 1024, hidden: int = 1024, dim: int = 256) -> None:
        super().__init__()
        self.d_audio, self.d_visual = d_audio, d_visual
        self.audio = nn.Sequential(nn.Linear(d_audio, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.visual = nn.Sequential(nn.Linear(d_visual, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d_audio) and (M, d_visual) features to x (N, dim) and y (M, dim), float32 or float64.

        Raises:
            TypeError, ValueError: for another dtype or shape.
        """
        audio = sets.features("audio", audio, "(N, D)", self.d_audio)
        visual = sets.features("visual", visual, "(M, D)", self.d_visual)
        dtype = next(self.parameters()).dtype
        return sets.unit(self.audio(audio.to(dtype))), sets.unit(self.visual(visual.to(dtype)))
