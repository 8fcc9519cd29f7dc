"""Complete systems: an encoder for each side, a common space, and the published settings of each system."""

from __future__ import annotations

from typing import NamedTuple

from torch import Generator, Tensor, nn

from goal.models.image import Projection, RegionImage
from goal.models.sets import unit
from goal.models.text import GRUText, TokenText

Input = Tensor | tuple[Tensor, Tensor]  # values, or (values, lengths)


class Joint(nn.Module):
    """Two encoders into one space: ``x, y = model(images, texts)`` is what objectives take.

        x = e / ‖e‖,  or |e| / ‖e‖ for order embeddings

    Args:
        image: an encoder, called as ``image(values, lengths, generator)``.
        text: another.
        order: absolute values, for ``similarity="order"``.

    Example:
        >>> import goal, torch
        >>> from goal.models import Joint, Projection
        >>> model = Joint(Projection(1280, dim=64), Projection(384, dim=64))
        >>> x, y = model(torch.randn(8, 1280), torch.randn(8, 384))
        >>> goal.recipe("vse++")(x, y).backward()

    Source: Faghri et al., VSE++, BMVC 2018, §3, and its release, which normalises order embeddings too.
    """

    def __init__(self, image: nn.Module, text: nn.Module, order: bool = False) -> None:
        super().__init__()
        self.image, self.text, self.order = image, text, order

    def forward(self, images: Input, texts: Input, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """A batch of both sides to x (N, D) and y (M, D), float32 or float64.

        Args:
            images: what the image encoder takes: values, or (values, lengths).
            texts: the same for texts; ``vocabulary.encode(captions)`` is such a pair.
            generator: what decides in training what is dropped and masked, images first; by default torch's own.
        """
        return self.embed_x(images, generator), self.embed_y(texts, generator)

    def embed_x(self, images: Input, generator: Generator | None = None) -> Tensor:
        """Images alone, to (N, D)."""
        return self._embed(self.image, images, generator)

    def embed_y(self, texts: Input, generator: Generator | None = None) -> Tensor:
        """Texts alone, to (M, D)."""
        return self._embed(self.text, texts, generator)

    def _embed(self, encoder: nn.Module, given: Input, generator: Generator | None) -> Tensor:
        values, lengths = given if isinstance(given, tuple) else (given, None)
        e = unit(encoder(values, lengths, generator))
        return e.abs() if self.order else e


def vse_pp(tokens: int, *, d_image: int = 2048, dim: int = 1024, d_word: int = 300, order: bool = False) -> Joint:
    """VSE++: a linear projection of one image vector; word embedding and GRU, its last state.

    Args:
        tokens: `len(vocabulary)`.
        d_image: dimensions of the image features: 2048 of ResNet-152, 4096 of VGG-19.
        dim: of the joint space.
        d_word: of the word embedding.
        order: order embeddings, for the recipes `order0` and `order++`.

    Example:
        >>> import goal, torch
        >>> from goal.models import Vocabulary, vse_pp
        >>> vocabulary = Vocabulary.of(["a dog", "a cat runs"], min_count=1)
        >>> model = vse_pp(len(vocabulary), dim=16, order=True)
        >>> x, y = model(torch.randn(2, 2048), vocabulary.encode(["a dog", "a cat"]))
        >>> goal.recipe("order0")(x, y).backward()

    Source: Faghri et al., "VSE++: improving visual-semantic embeddings with hard negatives", BMVC 2018, §3, §4.
    """
    return Joint(Projection(d_image, dim), GRUText(tokens, dim, d_word), order)


def vse_infinity(
    tokens: int | None = None, *, d_token: int | None = None, d_image: int = 2048, dim: int = 1024, d_word: int = 300
) -> Joint:
    """VSE∞: regions through fc(v) + MLP(v), words through a BiGRU or given as token features, each pooled by the GPO.

    In training 20 % of the regions are dropped, and 20 % of the words masked (of token features, dropped).

    Args:
        tokens: `len(vocabulary)`, for captions as words, or
        d_token: dimensions of precomputed token features. One of the two.
        d_image: dimensions of a region's features.
        dim: of the joint space.
        d_word: of the word embedding.

    Raises:
        ValueError: both `tokens` and `d_token`, or neither.

    Example:
        >>> import goal, torch
        >>> from goal.models import vse_infinity
        >>> model = vse_infinity(d_token=768, dim=16)
        >>> x, y = model(torch.randn(4, 36, 2048), (torch.randn(4, 9, 768), torch.tensor([9, 3, 5, 4])))
        >>> goal.recipe("vse++")(x, y).backward()

    Source: Chen et al., "Learning the best pooling strategy for visual semantic embedding", CVPR 2021.
    """
    return Joint(RegionImage(d_image, dim, "input"), _text(tokens, d_token, dim, d_word))


def rvse_pp(
    tokens: int | None = None, *, d_token: int | None = None, d_image: int = 2048, dim: int = 1024, d_word: int = 300
) -> Joint:
    """RVSE++: VSE∞ with the residual on the projected feature, g = fc(v), f = g + MLP(g). Arguments as there.

    Example:
        >>> import goal, torch
        >>> from goal.models import rvse_pp
        >>> x, y = rvse_pp(d_token=768, dim=16)(torch.randn(4, 36, 2048), torch.randn(4, 9, 768))
        >>> goal.recipe("t-selhn")(x, y).backward()

    Source: Li et al., "Selectively hard negative mining for alleviating gradient vanishing in image-text matching".
    """
    return Joint(RegionImage(d_image, dim, "projected"), _text(tokens, d_token, dim, d_word))


def _text(tokens: int | None, d_token: int | None, dim: int, d_word: int) -> nn.Module:
    if (tokens is None) == (d_token is None):
        raise ValueError(f"give either tokens or d_token, got tokens={tokens}, d_token={d_token}.")
    if tokens is not None:
        return GRUText(tokens, dim, d_word, pooling="gpo", masking=0.2)
    assert d_token is not None
    return TokenText(d_token, dim)


class Published(NamedTuple):
    """How a system was trained, epochs counted from 0, with goal.recipe(recipe, T=goal.T.con(margin=margin))."""

    recipe: str
    margin: float
    optimizer: str  # in torch.optim
    lr: float
    weight_decay: float
    epochs: int
    drop_epoch: int  # from it on the learning rate is a tenth
    batch: int
    clip: float  # largest norm of the gradient
    warm_up: int  # first epochs, with the recipe `vse0` in place of `recipe`
    source: str


SETTINGS: dict[str, Published] = {
    "vse++": Published("vse++", 0.2, "Adam", 2e-4, 0.0, 30, 15, 128, 2.0, 0, "Faghri et al., BMVC 2018, §4; release"),
    "order0": Published("order0", 0.05, "Adam", 1e-3, 0.0, 30, 15, 128, 2.0, 0, "release of VSE++, README"),
    "order++": Published("order++", 0.2, "Adam", 2e-4, 0.0, 30, 15, 128, 2.0, 0, "release of VSE++, README"),
    "vse-infinity": Published(
        "vse++", 0.2, "AdamW", 5e-4, 1e-4, 25, 15, 128, 2.0, 1, "Chen et al., CVPR 2021; release"
    ),
    "rvse++": Published("t-selhn", 0.2, "AdamW", 5e-4, 1e-2, 30, 15, 128, 2.0, 0, "release of Li et al."),
    "scan": Published(
        "vse++", 0.2, "Adam", 2e-4, 0.0, 30, 15, 128, 2.0, 0, "Lee et al., ECCV 2018, Flickr30K; release"
    ),
}
