"""Similarities from cross attention, and hard negatives for a matching head."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from goal import validation
from goal.models import sets
from goal.models.image import linear
from goal.models.joint import Input
from goal.models.text import WordStates
from goal.stats import Stats

_HELD = 1 << 22  # attention weights made at once; backward makes them again


class CrossAttention(nn.Module):
    """Stacked cross attention, text to image: every word looks at the regions, and S is how well it finds itself.

    With unit vectors vᵢ (regions of an image) and eⱼ (words of a caption), s = v·e:

        s̄ᵢⱼ = max(0, sᵢⱼ) / ‖max(0, sᵢ·)‖    over the words
        αᵢⱼ = softmaxᵢ(λ₁ s̄ᵢⱼ)               over the regions
        aⱼ = Σᵢ αᵢⱼ vᵢ;   rⱼ = cos(eⱼ, aⱼ)
        S = log(Σⱼ exp(λ₂ rⱼ)) / λ₂  (lse),  or the mean of rⱼ

    No aⱼ is made: cos(eⱼ, aⱼ) = Σᵢ αᵢⱼ sᵢⱼ / √(αⱼᵀ V Vᵀ αⱼ). Attention weights are made some captions at a time, and
    again in backward, so memory stays bounded whatever N and M are.

    Args:
        pooling: over the words, `lse` or `mean`.
        attention: λ₁ > 0.
        sharpness: λ₂ > 0, of `lse`.

    Raises:
        ValueError: unknown pooling, or a λ that is not > 0.

    Example:
        >>> import goal, torch
        >>> from goal.models import CrossAttention
        >>> regions, words = torch.randn(8, 36, 64, requires_grad=True), torch.randn(8, 12, 64)
        >>> S = CrossAttention()(regions, words)
        >>> goal.apply_similarity(S, T=goal.T.con(margin=0.2), P="con", reduction="sum").backward()

    Source: Lee et al., "Stacked cross attention for image-text matching", ECCV 2018, §3.1, eq. 6-10. As in the paper
    s is cut at 0; its release lets a tenth of what is below pass.
    """

    def __init__(self, pooling: str = "lse", attention: float = 9.0, sharpness: float = 6.0) -> None:
        super().__init__()
        if pooling not in ("lse", "mean"):
            raise ValueError(f"pooling must be 'lse' or 'mean', got {pooling!r}.")
        for name, value in (("attention", attention), ("sharpness", sharpness)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}.")
        self.pooling, self.attention, self.sharpness = pooling, attention, sharpness

    def forward(
        self,
        regions: Tensor,
        words: Tensor,
        region_lengths: Tensor | None = None,
        word_lengths: Tensor | None = None,
    ) -> Tensor:
        """Regions (N, R, D), words (M, L, D), their lengths (N,) and (M,) (None: all are real), to S (N, M).

        Raises:
            TypeError, ValueError: for another shape or dtype, or a length out of range.
        """
        width = regions.shape[-1] if isinstance(regions, Tensor) else 0
        regions = sets.features("regions", regions, "(N, R, D)", width)
        words = sets.features("words", words, "(M, L, D)", width)
        said = sets.mask_of("word_lengths", word_lengths, words)
        v, e = _units(regions, sets.mask_of("region_lengths", region_lengths, regions)), _units(words, said)
        if v.dtype != e.dtype or v.device != e.device:
            got = f"{regions.dtype} on {regions.device} and {words.dtype} on {words.device}"
            raise TypeError(f"regions and words must have one dtype and one device, got {got}.")
        rows, cols = _block(len(v), len(e), v.shape[1] * e.shape[1])
        recompute = torch.is_grad_enabled() and (v.requires_grad or e.requires_grad)
        parts = []
        for some, gram in zip(v.split(rows), (v @ v.mT).split(rows), strict=True):
            line = []
            for captions, spoken in zip(e.split(cols), said.split(cols), strict=True):
                given = (some, gram, captions, spoken)
                line.append(checkpoint(self._tile, *given, use_reentrant=False) if recompute else self._tile(*given))
            parts.append(torch.cat(line, 1))
        return torch.cat(parts)

    def _tile(self, v: Tensor, gram: Tensor, e: Tensor, said: Tensor) -> Tensor:
        """(n, R, D), (n, R, R), (m, L, D), (m, L) → (n, m). What is padded is zero: no cosine sees it."""
        n, m = len(v), len(e)
        s = (v.flatten(0, 1) @ e.flatten(0, 1).T).view(n, v.shape[1], m, e.shape[1]).permute(0, 2, 3, 1)  # (n, m, L, R)
        scaled = sets.unit(s.clamp(min=0), dim=2)
        alpha = (self.attention * scaled).softmax(3)
        flat = alpha.flatten(1, 2)  # (n, m L, R)
        squared = ((flat @ gram) * flat).sum(2).view(n, m, -1)  # ‖a‖² (n, m, L)
        r = (alpha * s).sum(3) / squared.masked_fill(squared <= 0, 1).sqrt()
        if self.pooling == "mean":
            return r.sum(2) / said.sum(1)
        return (self.sharpness * r).masked_fill(~said, -torch.inf).logsumexp(2) / self.sharpness


def _units(values: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors where real, zeros where padded."""
    return sets.unpack(sets.unit(sets.pack(values, mask)), mask)


def _block(n: int, m: int, each: int) -> tuple[int, int]:
    """How many images and captions are compared at once, `each` weights a pair."""
    cols = min(m, max(1, _HELD // (n * each)))
    return min(n, max(1, _HELD // (cols * each))), cols


class SCAN(nn.Module):
    """The whole of it: regions through a linear layer, words through a BiGRU, `CrossAttention` between them.

    Args:
        tokens: `len(vocabulary)`.
        d_image: dimensions of a region's features.
        dim: of the joint space.
        d_word: of the word embedding.

    Example:
        >>> import goal, torch
        >>> from goal.models import SCAN, Vocabulary
        >>> vocabulary = Vocabulary.of(["a dog", "a cat runs"], min_count=1)
        >>> S = SCAN(len(vocabulary), dim=16)(torch.randn(2, 36, 2048), vocabulary.encode(["a dog", "a cat"]))
        >>> S.shape
        torch.Size([2, 2])

    Source: Lee et al., ECCV 2018, t-i LSE.
    """

    def __init__(self, tokens: int, d_image: int = 2048, dim: int = 1024, d_word: int = 300) -> None:
        super().__init__()
        self.fc = linear(d_image, dim)
        self.d_image = self.fc.in_features
        self.states = WordStates(tokens, dim, d_word)
        self.score = CrossAttention()

    def forward(self, images: Input, texts: Input) -> Tensor:
        """Regions (N, R, d_image) and tokens (M, L), each alone or with its lengths, to S (N, M)."""
        regions, region_lengths = images if isinstance(images, tuple) else (images, None)
        tokens, word_lengths = texts if isinstance(texts, tuple) else (texts, None)
        regions = sets.features("images", regions, "(N, R, D)", self.d_image)
        mask = sets.mask_of("region_lengths", region_lengths, regions)
        v = sets.unpack(self.fc(sets.pack(regions, mask).to(self.fc.weight.dtype)), mask)
        similarity: Tensor = self.score(v, self.states(tokens, word_lengths), region_lengths, word_lengths)
        return similarity


def hard_negatives(
    seen: Tensor | Stats,
    *,
    tau: float | None = None,
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A hard negative for each anchor of both directions: what a matching head is trained on.

    From `goal.Stats`, those that the objective mined. From a similarity matrix S the hardest, or with `tau` one drawn
    with probability ∝ exp(τ sᵢⱼ) among the anchor's negatives. Nothing flows back.

    Args:
        seen: ``objective.stats``, or S (N, M) with the pairs on its diagonal.
        tau: > 0; None takes the hardest (of equal ones the first).
        ids: (N,) integers; equal ids are never negatives, as in `goal.apply_similarity`.
        y_ids: (M,) integers.
        generator: what decides the draw; by default torch's own.

    Returns:
        (2, K) int64, K = min(N, M): the negative's column for anchors x→y, its row for y→x; −1 where there is none.

    Raises:
        ValueError, TypeError: a matrix or ids of another shape, a tau that is not > 0, or options that `Stats`, where
            all is decided, does not take.

    Example:
        >>> import torch
        >>> from goal.models import hard_negatives
        >>> hard_negatives(torch.tensor([[0.9, 0.1, 0.3], [0.4, 0.8, 0.2], [0.0, 0.7, 0.6]]))
        tensor([[2, 0, 1],
                [1, 2, 0]])

    Source: drawing in proportion to exp(τ s): Li et al., ALBEF, NeurIPS 2021, §3.2; Zeng et al., X-VLM, ICML 2022.
    """
    if isinstance(seen, Stats):
        if any(given is not None for given in (tau, ids, y_ids, generator)):
            raise ValueError("seen: goal.Stats holds what was mined; tau, ids, y_ids and generator go with S.")
        return seen.index
    s = sets.at_least_float32(validation.similarity_matrix(seen).detach())
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be > 0, or None for the hardest, got {tau}.")
    bad = (s.isnan() | (s == torch.inf)).any(1)
    if bool(bad.any()):
        raise ValueError(f"seen holds NaN or +inf in row {int(bad.nonzero()[0])}, and no hardest can be told there.")
    n, m = s.shape
    rows, cols = validation.identities(ids, y_ids, n, m, s.device)
    positive = torch.eye(n, m, dtype=torch.bool, device=s.device)
    if rows is not None and cols is not None:
        positive |= rows[:, None] == cols
    s, k = s.masked_fill(positive, -torch.inf), min(n, m)
    return torch.stack((_choose(s[:k], tau, generator), _choose(s[:, :k].T, tau, generator)))


def _choose(s: Tensor, tau: float | None, generator: Generator | None) -> Tensor:
    """A column of each row of (K, M), never one at −inf; −1 where all are."""
    largest = s.amax(1, keepdim=True)
    none = largest == -torch.inf
    if tau is None:
        places = torch.arange(s.shape[1], device=s.device)
        chosen = torch.where(s == largest, places, s.shape[1]).amin(1)
    else:
        odds = torch.where(none, 1, torch.exp(tau * (s - torch.where(none, 0, largest))))
        where = s.device if generator is None else generator.device
        chosen = torch.multinomial(odds.to(where), 1, generator=generator).squeeze(1).to(s.device)
    return torch.where(none.squeeze(1), -1, chosen)


def matching_pairs(negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that a matching head judges: each true one, and each anchor with its negative, both ways.

    Args:
        negatives: (2, K) int64 from `hard_negatives`; anchors at −1 are left out.

    Returns:
        rows (E,) of x, cols (E,) of y, and target (E,) float32: 1 for the K true pairs, 0 for the up to 2K others.

    Example:
        >>> import torch
        >>> from goal.models import matching_pairs
        >>> matching_pairs(torch.tensor([[1, 0], [1, -1]]))
        (tensor([0, 1, 0, 1, 1]), tensor([0, 1, 1, 0, 0]), tensor([1., 1., 0., 0., 0.]))

    Source: the image-text matching loss of ALBEF and X-VLM.
    """
    if negatives.dim() != 2 or len(negatives) != 2:
        raise ValueError(f"negatives must have shape (2, K), got {tuple(negatives.shape)}.")
    anchors = torch.arange(negatives.shape[1], device=negatives.device)
    rows = torch.cat((anchors, anchors, negatives[1]))
    cols = torch.cat((anchors, negatives[0], anchors))
    target = torch.cat((torch.ones_like(anchors), torch.zeros_like(negatives).flatten())).float()
    there = (rows >= 0) & (cols >= 0)
    return rows[there], cols[there], target[there]
