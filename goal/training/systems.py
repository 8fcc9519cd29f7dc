"""The models that `goal train` knows, as a table: a row has everything that distinguishes a model from the others."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import goal
from goal.models import SCAN, SETTINGS, AudioVisual, GRUText, Joint, Projection, RegionImage, TokenText
from goal.spec import Spec, parse
from goal.training.features import Images, Inputs, Split, Texts, Words
from goal.training.heads import Heads

ROWS = 256  # embedded at once in evaluation
TOKENS = 64 * ROWS  # of their captions, padded

GOAL = parse("cir × sig-ms")

Sizes = Mapping[str, Any]  # dim, hidden, word_dim, dropout: what `ModelConfig` holds
Build = Callable[[Inputs, Sizes, bool], nn.Module]  # the last: whether embeddings are for the similarity `order`


@dataclass(frozen=True)
class System:
    """A model: what it is made of, what it reads, how it is judged, and the settings that it comes with."""

    what: str  # in a few words
    build: Build  # as it is initialised
    images: Images  # how it reads them, see `features`
    texts: tuple[Texts, ...]  # how it may read captions; the first by default
    settings: Mapping[str, Any]  # defaults of `TrainConfig`; sizes that are not here the model does not have
    quick: Mapping[str, Any]  # settings of a sweep that is to end within minutes
    objective: Spec = GOAL  # by default
    cell: Spec = GOAL  # what of T × P is not said, its axes included
    judged: Literal["rsum", "map"] = "rsum"  # map: MAP@all of labelled clips
    gives: Literal["embeddings", "similarities"] = "embeddings"
    fit: Callable[[Any, Split], None] | None = None  # takes from the training split what is not learned
    prepare: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None  # x and y of a split, once for all steps


# ── what models are made of ─────────────────────────────────────────────────────────────────────────────────────────


def _heads(inputs: Inputs, sizes: Sizes, order: bool) -> nn.Module:
    if inputs.y_kind != "vectors":
        raise ValueError("model heads takes one vector a caption; vse++ and the others take tokens too.")
    hidden, dim, dropout = (sizes[size] for size in ("hidden", "dim", "dropout"))
    return Heads(inputs.x, inputs.y, hidden=hidden, dim=dim, dropout=dropout, unit=not order)


def _clips(inputs: Inputs, sizes: Sizes, order: bool) -> nn.Module:
    return AudioVisual(inputs.x, inputs.y, sizes["hidden"], sizes["dim"], sizes["dropout"])


def _scan(inputs: Inputs, sizes: Sizes, order: bool) -> nn.Module:
    if inputs.y_kind != "words":
        raise ValueError("texts must be words: scan reads captions as words.")
    return SCAN(inputs.y, inputs.x, sizes["dim"], sizes["word_dim"])


def _pooled(inputs: Inputs, sizes: Sizes, order: bool, *, absolute: bool = True) -> nn.Module:
    """VSE++; order embeddings are `absolute`, |e|, or as they come."""
    image = Projection(inputs.x, sizes["dim"])
    return Joint(image, _captions(inputs, sizes, "last"), order=order and absolute)


def _regions(inputs: Inputs, sizes: Sizes, order: bool, *, residual: Literal["input", "projected"]) -> nn.Module:
    """VSE∞, or RVSE++ by its residual."""
    return Joint(RegionImage(inputs.x, sizes["dim"], residual), _captions(inputs, sizes, "gpo", 0.2), order=order)


def _captions(inputs: Inputs, sizes: Sizes, *pooling: Any) -> nn.Module:
    if inputs.y_kind == "words":
        return GRUText(inputs.y, sizes["dim"], sizes["word_dim"], *pooling)
    return TokenText(inputs.y, sizes["dim"]) if inputs.y_kind == "tokens" else Projection(inputs.y, sizes["dim"])


def _fit_heads(heads: Heads, train: Split) -> None:
    heads.x.centre.copy_(train.x.mean(0))
    heads.y.centre.copy_(train.y.mean(0))


def _fit_clips(model: AudioVisual, train: Split) -> None:
    model.standardise(train.x, train.y)


def _scaled(heads: Heads, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return heads.x.scale(x), heads.y.scale(y)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────

_OURS = {
    "batch": 128, "optimiser": "AdamW", "lr": 5e-4, "weight_decay": 0.01, "warmup": 100, "clip": 2.0, "average": 0.98,
    "epochs": 0, "eval_every": 50, "max_steps": 6000, "patience": 12, "drops": 1,
    "hidden": 1024, "dropout": 0.3,
}  # fmt: skip


# Sized to end within five minutes on two cores, with an order that agrees with the full sweep's within noise
# (docs/experiments.md compares them): embeddings not too narrow, and runs that end when validation stops rising.
_QUICK = {"hidden": 256, "dim": 256, "batch": 64, "lr": 1e-3, "patience": 4, "max_steps": 2000}


def _published(name: str, images: Images, what: str, build: Build, **more: Any) -> System:
    """A row with the settings of `goal.models.SETTINGS`; T × P is summed or averaged as the recipe is, which the clip
    that was published goes with.
    """
    its = SETTINGS[name]
    settings = {
        "dim": 1024, "word_dim": 300, "batch": its.batch, "optimiser": its.optimizer, "lr": its.lr,
        "weight_decay": its.weight_decay, "warmup": 0, "clip": its.clip, "average": 0.0,
        "epochs": its.epochs, "drop_epoch": its.drop_epoch, "all_first": its.warm_up,
        "eval_every": 0, "drops": 1,
    }  # fmt: skip
    recipe: Any = goal.recipe(its.recipe)
    axes = {"similarity": recipe.settings.similarity.name, "reduction": recipe.settings.reduction}
    usual = {"similarity": "dot", "reduction": "mean"}
    cell = GOAL.with_axes(**{axis: axes[axis] for axis in axes if axes[axis] != usual[axis]})
    objective = parse(f"{its.recipe}(margin={its.margin})")
    quick = {"dim": 128, "word_dim": 64, "epochs": 6, "drop_epoch": 4}
    return System(what, build, images, ("words", "features"), settings, quick, objective, cell, **more)


_HINGE = parse("con(margin=0.2) × con | semi-hard")
_NOT_ABSOLUTE = functools.partial(_pooled, absolute=False)  # as the release of order++
_VSE_INFINITY = functools.partial(_regions, residual="input")
_RVSE = functools.partial(_regions, residual="projected")

DEFAULT = "heads"
SYSTEMS: dict[str, System] = {
    "heads": System("two layers on frozen features of images and captions", _heads, "vectors", ("features",),
                    {**_OURS, "dim": 512}, _QUICK, fit=_fit_heads, prepare=_scaled),
    "vse++": _published("vse++", "unit vectors", "a linear layer; words, GRU", _pooled),
    "order0": _published("order0", "unit vectors", "VSE++ with order embeddings, |e|", _pooled),
    "order++": _published("order++", "unit vectors", "VSE++ with order embeddings", _NOT_ABSOLUTE),
    "vse-infinity": _published("vse-infinity", "regions", "regions, MLP, GPO; words, BiGRU, GPO", _VSE_INFINITY),
    "rvse++": _published("rvse++", "regions", "VSE∞ with the residual on the projected features", _RVSE),
    "scan": _published("scan", "regions", "cross attention of words and regions", _scan, gives="similarities"),
    "audio-visual": System("two layers on features of labelled clips", _clips, "audio", ("visual",),
                           {**_OURS, "dim": 256}, _QUICK, _HINGE, _HINGE, judged="map", fit=_fit_clips),
}  # fmt: skip


# ── what training does with a model ─────────────────────────────────────────────────────────────────────────────────


def prepared(system: System, model: nn.Module, split: Split, device: torch.device) -> Split:
    """A split as the model embeds it: what is small on the device for good, and for heads scaled once."""
    x, y = (side.to(device) if isinstance(side, Tensor) else side for side in split[:2])
    if system.prepare is not None:
        x, y = system.prepare(model, x, y)
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
