"""The systems that `goal train` knows: what a model is made of, what it reads, and the settings that it comes with."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import goal
from goal.models import SCAN, SETTINGS, AudioVisual, GRUText, Joint, Projection, RegionImage, TokenText
from goal.training.features import Images, Inputs, Split, Texts, Words
from goal.training.heads import Heads

ROWS = 256  # embedded at once in evaluation
TOKENS = 64 * ROWS  # of their captions, padded


class System(NamedTuple):
    """A model by its name."""

    what: str  # in a few words
    images: Images  # how it reads them, see `features`
    texts: tuple[Texts, ...]  # how it may read captions; the first by default
    defaults: dict[str, Any]  # of the fields of `TrainConfig`
    recipe: str | None = None  # its objective, with `margin`
    margin: float = 0.2
    order: bool = False  # s = −‖max(0, y − x)‖
    reduction: str = "mean"  # of T × P, in place of the recipe; the clip that was published goes with the recipe's

    @property
    def of_clips(self) -> bool:
        """Whether it is of labelled clips, and so judged by MAP@all, not by recalls."""
        return self.images == "audio"


def _published(name: str, images: Images, what: str) -> System:
    """A system with the settings of `goal.models.SETTINGS`."""
    its = SETTINGS[name]
    defaults = {
        "dim": 1024, "word_dim": 300, "batch": its.batch, "optimizer": its.optimizer, "lr": its.lr,
        "weight_decay": its.weight_decay, "warmup": 0, "clip": its.clip, "average": 0.0,
        "epochs": its.epochs, "drop_epoch": its.drop_epoch, "all_first": its.warm_up,
        "eval_every": 0, "drops": 1,
    }  # fmt: skip
    order = its.recipe.startswith("order")
    recipe: Any = goal.recipe(its.recipe)
    reduction = recipe.settings.reduction
    return System(what, images, ("words", "features"), defaults, its.recipe, its.margin, order, reduction)


_HEADS = {
    "batch": 128, "optimizer": "AdamW", "weight_decay": 0.01, "clip": 2.0, "average": 0.98,
    "epochs": 0, "eval_every": 50, "max_steps": 6000, "patience": 12, "drops": 1,
}  # fmt: skip
SYSTEMS: dict[str, System] = {
    "heads": System(
        "two layers on frozen features of images and captions",
        "vectors",
        ("features",),
        _HEADS | {"hidden": 1024, "dim": 512, "dropout": 0.3, "lr": 5e-4, "warmup": 100},
    ),
    "vse++": _published("vse++", "unit vectors", "a linear layer; words, GRU"),
    "order0": _published("order0", "unit vectors", "VSE++ with order embeddings, |e|"),
    "order++": _published("order++", "unit vectors", "VSE++ with order embeddings"),
    "vse-infinity": _published("vse-infinity", "regions", "regions, MLP, GPO; words, BiGRU, GPO"),
    "rvse++": _published("rvse++", "regions", "VSE∞ with the residual on the projected features"),
    "scan": _published("scan", "regions", "cross attention of words and regions"),
    "audio-visual": System(
        "two layers on features of labelled clips",
        "audio",
        ("visual",),
        _HEADS | {"hidden": 1024, "dim": 256, "dropout": 0.3, "lr": 5e-4, "warmup": 100},
    ),
}


def build(name: str, inputs: Inputs, order: bool, sizes: dict[str, Any]) -> nn.Module:
    """A model, as it is initialised.

    Args:
        name: of `SYSTEMS`.
        inputs: what it reads.
        order: embeddings for the similarity `order`.
        sizes: its fields of `TrainConfig`: dim, hidden, …

    Raises:
        ValueError: captions of a kind that it does not take.
    """
    if name == "heads":
        if inputs.y_kind != "vectors":
            raise ValueError("model: heads take one vector a caption; vse++ and the others take tokens too")
        hidden, dim, dropout = (sizes[size] for size in ("hidden", "dim", "dropout"))
        return Heads(inputs.x, inputs.y, hidden=hidden, dim=dim, dropout=dropout, unit=not order)
    if name == "audio-visual":
        return AudioVisual(inputs.x, inputs.y, sizes["hidden"], sizes["dim"], sizes["dropout"])
    dim, d_word = sizes["dim"], sizes["word_dim"]
    if name == "scan":
        if inputs.y_kind != "words":
            raise ValueError("texts: scan reads captions as words")
        return SCAN(inputs.y, inputs.x, dim, d_word)
    regions = SYSTEMS[name].images == "regions"
    image: nn.Module
    if regions:
        image = RegionImage(inputs.x, dim, "projected" if name == "rvse++" else "input")
    else:
        image = Projection(inputs.x, dim)
    text: nn.Module
    if inputs.y_kind == "words":
        text = GRUText(inputs.y, dim, d_word, *(("gpo", 0.2) if regions else ("last",)))
    else:
        text = TokenText(inputs.y, dim) if inputs.y_kind == "tokens" else Projection(inputs.y, dim)
    return Joint(image, text, order=order and name != "order++")  # its release takes no absolute value


def fit(model: nn.Module, train: Split) -> None:
    """What a model takes from the training split before it learns: centres, and for clips scales."""
    if isinstance(model, Heads):
        model.x.centre.copy_(train.x.mean(0))
        model.y.centre.copy_(train.y.mean(0))
    elif isinstance(model, AudioVisual):
        model.standardise(train.x, train.y)


def prepared(model: nn.Module, split: Split, device: torch.device) -> Split:
    """A split as the model embeds it: for heads scaled once, and where it is small on the device for good."""
    x, y = (side.to(device) if isinstance(side, Tensor) else side for side in split[:2])
    if isinstance(model, Heads):
        x, y = model.x.scale(x), model.y.scale(y)
    return split._replace(x=x, y=y)


def moved(values: Any, device: torch.device) -> Any:
    """An input on the device."""
    return tuple(part.to(device) for part in values) if isinstance(values, tuple) else values.to(device)


class Encoders(nn.Module):
    """A model that embeds, as `DistributedDataParallel` wraps it: x and y of a batch's inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return self.model.embed_x(x), self.model.embed_y(y)


def loss_of(model: nn.Module, objective: Any, x: Any, y: Any, ids: Tensor) -> Tensor:
    """The objective of a batch: of the x and y that a model makes of it, or of its S."""
    made = model(x, y)
    loss: Tensor = objective(*made, ids=ids) if isinstance(made, tuple) else objective.apply_similarity(made, ids=ids)
    return loss


def embeddings(model: nn.Module, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """All of a split's x and y."""

    def all_of(side: Any, embed: Any) -> Tensor:
        return torch.cat([embed(moved(side[rows], device)) for rows in _blocks(side)])

    return all_of(split.x, model.embed_x), all_of(split.y, model.embed_y)


def similarities(model: nn.Module, split: Split, device: torch.device) -> Tensor:
    """S (n, m) of a model that makes it itself, block by block, on the CPU."""
    lines = []
    for rows in _blocks(split.x):
        x = moved(split.x[rows], device)
        lines.append(torch.cat([model(x, moved(split.y[cols], device)).cpu() for cols in _blocks(split.y)], 1))
    return torch.cat(lines)


def _blocks(side: Any) -> Iterator[slice]:
    """The rows of a side, some at a time: `ROWS`, but fewer where a long caption would pad all to its length."""
    lengths = side.lengths.tolist() if isinstance(side, Words) else [1] * len(side)
    start = width = 0
    for row, length in enumerate(lengths):
        width = max(width, length)
        if row > start and (row - start == ROWS or (row - start + 1) * width > TOKENS):
            yield slice(start, row)
            start, width = row, length
    yield slice(start, len(lengths))
