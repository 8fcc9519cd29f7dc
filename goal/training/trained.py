"""A trained run: its model with the best weights, its data, and its score."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import goal
from goal import data
from goal.data.files import Damaged
from goal.evaluation import MapMetrics, RetrievalMetrics, evaluate, evaluate_similarity, map_at_all
from goal.models import Vocabulary
from goal.training import systems
from goal.training.config import TrainConfig, available, check_device
from goal.training.features import Inputs, Split, fingerprint, inputs_of, labelled, split
from goal.training.folder import Row, check_tensors, digest, read_tensors
from goal.training.systems import SYSTEMS


class Trained(NamedTuple):
    """What a run has left."""

    config: TrainConfig
    model: nn.Module  # with the best weights, in evaluation mode
    vocabulary: Vocabulary | None
    inputs: Inputs  # what the model reads
    fingerprints: dict[str, str]  # of the splits that it was trained, validated and tested on

    def split(self, name: str) -> Split:
        """A split of its data, in the form that its model takes.

        Raises:
            ValueError: what the readers refuse, or features of other dimensions than the model's.
        """
        system = SYSTEMS[self.config.model.name]
        if system.judged == "map":
            part = labelled(self.config.data, name)
        else:
            part = split(data.load(self.config.data, name), system.images, self.vocabulary)
        if (found := inputs_of(part, self.vocabulary)) != self.inputs:
            raise ValueError(f"{self.config.data}: {name!r} has {found}, and the model reads {self.inputs}.")
        known = None if name == "train" and self.config.limit else self.fingerprints.get(name)
        if known is not None and known != fingerprint(part, self.vocabulary):
            warnings.warn(f"{self.config.data}: {name!r} is not what it was when the model was trained", stacklevel=2)
        return part


def load_trained(run_dir: Path, *, device: str | None = None, data: str | None = None) -> Trained:
    """The configuration of a run, its best weights, and the words of its captions.

    Args:
        run_dir: the run's folder.
        device: where to compute; by default where it was trained, or on the CPU where that is not there.
        data: the dataset that `Trained.split` reads; by default the one it was trained on, where it lay then. That it
            has changed is a warning.

    Raises:
        ValueError: no finished run in the folder, a damaged file (named), a device that is not there.
    """
    path = Path(run_dir) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no finished run (there is no model.safetensors).")
    try:
        told, tensors = read_tensors(path, "run")
        config, inputs = TrainConfig.from_json(json.dumps(told["config"])), Inputs(**told["inputs"])
        if told.get("sha256") not in (None, digest(tensors)):
            raise Damaged("its content is not what was written")
        prints, at = dict(told.get("data", {})), str(told.get("at", config.data))
    except Exception as error:  # whatever a damaged file leads to
        raise Damaged(f"{path}: holds no run: {error}") from error
    if device is not None or not available(config.device):
        config = dataclasses.replace(config, device=device or "cpu")
    check_device(config.device)
    config = dataclasses.replace(config, data=at if data is None else data)
    with torch.device("meta"):  # sizes first: a wrong one takes no memory
        like = build_model(config, inputs)
    check_tensors(path, tensors, like.state_dict())
    with plain_defaults():
        model = build_model(config, inputs)
    model.load_state_dict(tensors)
    vocabulary = None
    if inputs.y_kind == "words":
        vocabulary = Vocabulary.load(path.with_name("vocabulary.json"))
        if len(vocabulary) != inputs.y:
            raise Damaged(f"{path.with_name('vocabulary.json')}: has {len(vocabulary)} tokens, the model {inputs.y}")
    return Trained(config, model.eval().to(config.device), vocabulary, inputs, prints if data is None else {})


def score(config: TrainConfig, model: nn.Module, part: Split, folds: int = 1) -> RetrievalMetrics | MapMetrics:
    """Retrieval metrics of a split as a model of `SYSTEMS` embeds it; the products in float32."""
    with torch.inference_mode(), plain_defaults():
        prepared = systems.prepared(SYSTEMS[config.model.name], model, part, torch.device(config.device))
        return measured(config, model, prepared, similarity_of(config.build_objective()), folds)[0]


def measured(
    config: TrainConfig, model: nn.Module, part: Split, similarity: str, folds: int = 1
) -> tuple[RetrievalMetrics | MapMetrics, Row]:
    """Metrics of a prepared split, and the mean s⁺ and hardest s⁻ of its images and first captions."""
    device = torch.device(config.device)
    first = torch.from_numpy(np.unique(part.image_of.numpy(), return_index=True)[1])  # caption of each image
    system = SYSTEMS[config.model.name]
    if system.gives == "similarities":
        s = systems.similarities(model, part, device)
        objective = goal.Objective(T="con", P="con")
        objective.apply_similarity(s[:, first], ids=part.ids)
        return evaluate_similarity(s, part.image_of, folds=folds), _seen(objective.stats)
    x, y = systems.embeddings(model, part, device)
    stats = goal.gradients(x, y[first], T="con", P="con", similarity=similarity, ids=part.ids.to(device))[2]
    if system.judged == "map":
        return map_at_all(x, y, part.ids, part.ids, similarity=similarity), _seen(stats)
    return evaluate(x, y, part.image_of, similarity=similarity, folds=folds), _seen(stats)


def _seen(stats: goal.Stats) -> Row:
    return {"s_pos": stats.s_pos.mean().item(), "s_neg": stats.s_neg.mean().item()}


def build_model(config: TrainConfig, inputs: Inputs) -> nn.Module:
    """A model, as it is initialised."""
    order = similarity_of(config.build_objective()) == "order"
    return SYSTEMS[config.model.name].build(inputs, dataclasses.asdict(config.model), order)


def similarity_of(objective: nn.Module) -> str:
    """The name of the similarity that an objective compares by."""
    settings: Any = getattr(objective, "settings", None)  # a yardstick has none
    return "dot" if settings is None else str(settings.similarity.name)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """What modules are made of where nothing else is said: float32 on the CPU."""
    before, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
