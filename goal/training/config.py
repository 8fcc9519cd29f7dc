"""Everything that decides the result of a run, in one frozen object."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import numbers
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from torch import nn

import goal
from goal.candidates import Augmented
from goal.data.files import readable
from goal.training.schedule import Curriculum, FewSemiHard, Plateau, Until
from goal.training.systems import SYSTEMS

Parameters = dict[str, float | None]
FREE = ("texts", "drop_epoch", "max_steps", "patience", "all_first")  # of every model
WIDEST = 1 << 16  # of a layer: more is a slip, and would go to the allocator
LONGEST = 4096  # characters of a text: what the paths of most systems may have
MOST = 10**6  # seeds, trials, workers, …
Kind = Literal["T", "P"]
KINDS: tuple[Kind, ...] = ("T", "P")
COUNT = re.compile(r"0*[1-9]\d{0,8}")


def _option(default: Any, help: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A field with its help text and its range, [low, high] or (low, high]."""
    its = {"help": help, "low": low, "high": high, "above": above, "of_model": False}
    return field(default=default, metadata=its)


def _of_model(help: str, **range: Any) -> Any:
    """A field whose default is the model's, in `SYSTEMS`; a model that has none there takes no value."""
    its: dict[str, Any] = {"low": -math.inf, "high": math.inf, "above": False} | range
    return field(default=None, metadata=its | {"help": f"{help} (default: the model's)", "of_model": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: the objective, the data, the model, the optimiser, when to stop, and how to compute.

    Fields that are left out are those of the model: `heads` are ours, the others are trained as they were published.

    Two runs with equal configurations on one machine, with the same versions and data, end with bit-equal results.

    Raises:
        ValueError, TypeError: an unknown name, a value out of range or of the wrong type, at construction.

    >>> config = TrainConfig(T="cir", P="sig_ms", params={"tau": 5})
    >>> config.label, config.params
    ('cir × sig-ms', {'tau': 5.0, 'alpha': 2.0, 'beta': 10.0, 'lam': 0.5})
    >>> TrainConfig.from_json(config.to_json()) == config
    True
    """

    # the objective
    T: str | None = _option(None, "triplet weight (default: the model's recipe; of heads, cir)")
    P: str | None = _option(None, "pair weight (default: the same; of heads, sig-ms)")
    recipe: str | None = _option(None, "a recipe of the literature, in place of T and P")
    mining: str | None = _option(
        None, "negatives that T × P meets: hardest, semi-hard, all, selective (default: hardest; of clips, semi-hard)"
    )
    reduction: str | None = _option(None, "mean or sum over the batch (default: the recipe's; of T × P, the model's)")
    params: dict[str, float] = field(default_factory=dict, hash=False)  # tau, margin, …; defaults are filled in
    all_first: int = _of_model("first epochs in which T × P meets all negatives (VSE∞'s warm-up)", low=0)
    curriculum: str | None = _option(
        None, "two stages: semi-hard, then hardest: plain, or among made rows, interpolate or mixup"
    )
    switch: str = _option("plateau", "when they change: plateau, few-semi-hard, or after so many evaluations")
    # the data
    data: str = _option("emoji", "the built-in emoji, or a folder of features")
    texts: str = _of_model("captions as words, or their given features")
    limit: int | None = _option(None, "train on the first images only, to try things on a slice", low=1)
    seed: int = _option(0, "of the first weights, the batches and the dropout", low=0, high=2**63 - 1)
    # the model
    model: str = _option("heads", "heads on frozen features, or a system of the literature: see goal models")
    hidden: int = _of_model("width of the hidden layer", low=1, high=WIDEST)
    dim: int = _of_model("dimensions of the embedding", low=1, high=WIDEST)
    word_dim: int = _of_model("dimensions of a word's embedding", low=1, high=WIDEST)
    dropout: float = _of_model("share of hidden units dropped", low=0, high=1)
    # the optimiser
    batch: int = _of_model("images in a batch, of all ranks together, each with one of its captions", low=2)
    optimizer: str = _of_model("Adam or AdamW")
    lr: float = _of_model("learning rate", low=0, above=True)
    weight_decay: float = _of_model("of the model's weights", low=0)
    warmup: int = _of_model("steps over which the learning rate rises linearly", low=0)
    clip: float = _of_model("largest norm of the gradient", low=0, above=True)
    average: float = _of_model("share that the running mean of the weights, which is tested, keeps", low=0, high=1)
    # how long
    epochs: int = _of_model("times that all captions fill batches once; 0: until a plateau", low=0)
    drop_epoch: int | None = _of_model("epoch from which the rate is lower, counted from 0", low=0)
    max_steps: int | None = _of_model("steps after which training ends in any case", low=1)
    eval_every: int = _of_model("steps between two evaluations on the validation split; 0: an epoch", low=0)
    patience: int | None = _of_model(
        "evaluations without a new best after which the rate drops, training ends, or stages change", low=1
    )
    drops: int = _of_model("how often the learning rate drops before a plateau ends training", low=0)
    drop: float = _option(
        0.1, "factor of a drop; one at a plateau also goes back to the best weights", low=0, high=1, above=True
    )
    # how it is computed
    dtype: str = _option("float32", "of the model's products: float32 or bfloat16")
    device: str = _option("cpu", "where to compute")
    threads: int = _option(1, "threads of one run", low=1, high=1024)

    def __post_init__(self) -> None:
        specs = {spec.name: spec for spec in dataclasses.fields(self)}
        if _checked(specs["model"], self.model) not in SYSTEMS:
            raise ValueError(f"model: must be one of {', '.join(SYSTEMS)}, got {self.model!r}")
        for name, spec in specs.items():
            if name != "params":
                object.__setattr__(self, name, self._resolved(spec))
        if not isinstance(self.params, Mapping | None):
            raise TypeError(f"params: must be numbers by name, got {type(self.params).__name__} ({self.params!r})")
        object.__setattr__(self, "params", dict(self.params or {}))
        choices: dict[str, tuple[str, ...]] = {
            "dtype": ("float32", "bfloat16"), "optimizer": ("Adam", "AdamW"), "texts": SYSTEMS[self.model].texts
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: must be cpu, cuda or cuda:1 and so on, got {self.device!r}")
        self._name_objective()
        if self.reduction not in ("mean", "sum", None):
            raise ValueError(f"reduction: must be mean or sum, got {self.reduction!r}")
        base = self._base()
        if isinstance(base, goal.Objective):
            object.__setattr__(self, "reduction", base.settings.reduction)
        elif self.reduction is not None:
            raise ValueError(f"reduction: {self.label} has its own, got {self.reduction!r}")
        own = _parameters(base)
        if stray := [name for name in self.params if name not in own]:
            raise ValueError(f"params: {self.label} has no {stray[0]!r}; known: {', '.join(own) or 'none'}")
        checked = {name: _number(f"params[{name!r}]", value) for name, value in self.params.items()}
        params = {name: float(value) for name, value in {**own, **checked}.items() if value is not None}
        object.__setattr__(self, "params", params)
        self._check_stages()
        self.objective()

    def _resolved(self, spec: "dataclasses.Field[Any]") -> object:
        """A field's checked value, by default the model's."""
        value, its = getattr(self, spec.name), SYSTEMS[self.model].defaults
        if not spec.metadata["of_model"]:
            return _checked(spec, value)
        if value is None:
            value = SYSTEMS[self.model].texts[0] if spec.name == "texts" else its.get(spec.name)
            return None if value is None else _checked(spec, value)
        if spec.name not in {*its, *FREE}:
            raise ValueError(f"{spec.name}: model {self.model} has none, got {value!r}")
        return _checked(spec, value)

    def _name_objective(self) -> None:
        """T, P and mining, or the recipe, in full."""
        system, given = SYSTEMS[self.model], [name for name in ("T", "P", "mining") if getattr(self, name) is not None]
        if self.recipe is None and not given and system.recipe is not None:
            object.__setattr__(self, "recipe", system.recipe)
            object.__setattr__(self, "params", {"margin": system.margin} | self.params)
        elif self.recipe is not None and given:
            raise ValueError(f"recipe: {self.recipe!r} stands in place of T, P and mining; got {given[0]} too")
        elif self.recipe is None:
            terms = ("con", "con") if system.of_clips else ("cir", "sig-ms")
            if system.of_clips and self.T in (None, "con"):
                object.__setattr__(self, "params", {"margin": system.margin} | self.params)
            for name, default in zip(KINDS, terms, strict=True):
                object.__setattr__(self, name, _definition(name, getattr(self, name) or default).name)
            object.__setattr__(self, "mining", self.mining or ("semi-hard" if system.of_clips else "hardest"))

    def _check_stages(self) -> None:
        """Whether the stages that are asked for can follow one another."""
        if not self.epochs and self.patience is None and self.max_steps is None:
            raise ValueError("epochs: with 0 training goes on until a plateau, which needs patience")
        if self.all_first and self.eval_every:
            raise ValueError(f"all_first: counts epochs, with eval_every=0; got eval_every={self.eval_every}")
        if self.curriculum is None:
            return
        if self.curriculum not in ("plain", "interpolate", "mixup"):
            raise ValueError(f"curriculum: must be plain, interpolate or mixup, got {self.curriculum!r}")
        if self.model == "scan" and self.curriculum != "plain":
            raise ValueError("curriculum: scan makes similarities, and rows are made of embeddings")
        if not isinstance(self._base(), goal.Objective):
            raise ValueError(f"curriculum: {self.label} mines nothing")
        if self.switch == "plateau" and self.patience is None:
            raise ValueError("switch: a plateau needs patience, which is None")
        if self.switch == "few-semi-hard" and self.all_first:
            raise ValueError("switch: few-semi-hard counts steps and all_first epochs; give all_first=0")
        if self.switch not in ("plateau", "few-semi-hard") and not COUNT.fullmatch(self.switch):
            raise ValueError(
                f"switch: must be plateau, few-semi-hard or a number of evaluations below 10⁹, got {self.switch[:80]!r}"
            )

    def objective(self, group: str | None = None) -> nn.Module:
        """The objective itself, its parameters bound; NaN passes into its gradient, where the loop sees it.

        Args:
            group: of ranks whose batches are one, for a model under `DistributedDataParallel`; see `goal.apply`.
        """
        base = self._base()
        if not isinstance(base, goal.Objective):
            its: dict[str, Any] = {"group": group, "averaged": group is not None, "check_finite": False}
            return goal.recipe(str(self.recipe), **self.params, **its)
        bound = functools.partial(self._bound, group=group, averaged=group is not None)
        stages: list[nn.Module] = []
        until: list[Until] = []
        if self.all_first and base.settings.mining.dense != "always":
            stages.append(bound(mining=goal.mining.all_negatives(average=False)))
            until.append(self.all_first)
        if self.curriculum is not None:
            stages.append(bound(mining="semi-hard"))
            until.append(self._switch())
            hardest = bound(mining="hardest")
            stages.append(hardest if self.curriculum == "plain" else Augmented(hardest, self.curriculum))
        else:
            stages.append(bound())
        return Curriculum(stages, until) if until else stages[0]

    def _switch(self) -> Until:
        if self.switch == "few-semi-hard":
            return FewSemiHard(share=0.1)
        return Plateau(int(self.patience or 1)) if self.switch == "plateau" else int(self.switch)

    def _bound(self, **changes: Any) -> goal.Objective:
        """One objective with the parameters bound, but for what changes."""
        base = cast(goal.Objective, self._base())
        bound: dict[str, Any] = {
            kind: term.definition(**term.params | {k: v for k, v in self.params.items() if k in term.params})
            for kind, term in _terms(base).items()
        }
        settings = base.settings
        own = {"mining": settings.mining, "reduction": settings.reduction, "similarity": settings.similarity}
        return goal.Objective(**bound, **{**own, **changes}, check_finite=False)

    def _base(self) -> nn.Module:
        system = SYSTEMS[self.model]
        if self.recipe is not None:
            base = goal.recipe(self.recipe)
            other = self.reduction is not None and isinstance(base, goal.Objective)
            return goal.recipe(self.recipe, reduction=self.reduction) if other else base
        T, P = (_definition(name, str(getattr(self, name))) for name in KINDS)
        similarity, reduction = "order" if system.order else "dot", self.reduction or system.reduction
        return goal.Objective(T, P, mining=str(self.mining), reduction=reduction, similarity=similarity)

    def definitions(self) -> dict[str, str]:
        """What tells terms of the user's own from others of their names: digests of their code."""
        base = self._base()
        terms = _terms(base) if isinstance(base, goal.Objective) else {}
        functions = {kind: t.definition.function for kind, t in terms.items() if not t.name.startswith("found-")}
        return {kind: _code(f) for kind, f in functions.items() if not str(f.__module__).startswith("goal.")}

    @property
    def label(self) -> str:
        """How tables call the objective."""
        mining = f", {self.mining}" if self.mining not in ("hardest", None) and self.curriculum is None else ""
        stages = f", curriculum {self.curriculum}" if self.curriculum else ""
        return (self.recipe or f"{self.T} × {self.P}") + mining + stages

    @property
    def setting(self) -> str:
        """The model and how it is trained, for the note under a table."""
        size = f"{self.hidden} → {self.dim}" if self.hidden else f"of {self.dim} dimensions"
        long = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.model} {size}, batch {self.batch}, {self.optimizer} at {self.lr:g}{long}"

    @property
    def names(self) -> dict[str, str | None]:
        """T, P, recipe and label as a record carries them: `con` with its margin, "-" for a recipe's T and P."""
        T = f"{self.T}({self.params['margin']:g})" if "margin" in self.params else self.T
        names = {"T": T, "P": self.P} if self.recipe is None else {"T": "-", "P": "-"}
        return {**names, "recipe": self.recipe, "label": self.label}

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that change with every field."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]

    @property
    def run_name(self) -> str:
        """Name of the run's folder: readable, and another one for every configuration."""
        system = "" if self.model == "heads" else f"{self.model}-"
        return f"{system}{readable(self.label)}-s{self.seed}-{self.digest}"

    def to_json(self) -> str:
        """As JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: no JSON, or a field that does not exist.
        """
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("a configuration is no JSON so deep") from error
        known = {spec.name for spec in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError(f"a configuration is a JSON object with the fields {', '.join(sorted(known))}")
        return cls(**values)


def _definition(kind: Kind, name: str) -> Any:
    """The term of that name. One that a search found is spelled by its name, so that every process knows it."""
    if name.startswith("found-"):
        from goal.lab.grammar import definition

        return definition(kind, name)
    return (goal.T if kind == "T" else goal.P)[name]


def _code(function: Any) -> str:
    """A digest of what a function does, wherever it is written; of other callables only their kind is known."""

    def described(code: Any) -> str:
        if isinstance(code, frozenset):  # in one order, whatever the process makes of it
            return str(sorted(map(repr, code)))
        if not isinstance(code, types.CodeType):
            return repr(code)
        return f"{code.co_code!r} {code.co_names} {[described(constant) for constant in code.co_consts]}"

    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    told = described(getattr(function, "__code__", type(function).__qualname__))
    told += repr([cell for cell in cells if isinstance(cell, int | float | str)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def available(device: str) -> bool:
    """Whether this machine has it, and this torch can use it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # no such device, or a torch that was built without
        return False
    return True


def check_device(device: str) -> None:
    """Raise where a run cannot be computed; a configuration is valid on every machine.

    Raises:
        ValueError: a device that is not there.
    """
    if not available(device):
        raise ValueError(f"device: {device!r} is not on this machine, or this PyTorch was built without it")


def _terms(objective: goal.Objective) -> dict[str, Any]:
    product = objective.settings.product
    return {"T": product.T, "P": product.P}


def _parameters(objective: nn.Module) -> Parameters:
    """The numbers that an objective takes, by name."""
    if isinstance(objective, goal.Objective):
        params = [item for term in _terms(objective).values() for item in term.params.items()]
        return {name: value for name, value in params if not isinstance(value, bool)}
    own = inspect.signature(type(objective)).parameters.items()
    return {name: p.default for name, p in own if p.kind is p.POSITIONAL_OR_KEYWORD}


def _checked(spec: "dataclasses.Field[Any]", value: object) -> object:
    """A field's value in its own type and range."""
    kind, low, high = str(spec.type), spec.metadata["low"], spec.metadata["high"]
    optional = "None" in kind
    if value is None and optional:
        return None
    if "str" in kind:
        if not isinstance(value, str):
            raise TypeError(f"{spec.name}: must be text, got {type(value).__name__} ({value!r})")
        if "\0" in value:
            raise ValueError(f"{spec.name}: must hold no NUL, got {value!r}")
        if len(value) > LONGEST:
            raise ValueError(f"{spec.name}: must be of at most {LONGEST} characters, got {len(value)}")
        return value
    whole = "int" in kind
    number = _number(spec.name, value, whole)
    if not low <= number <= high or (spec.metadata["above"] and number == low):
        least = f"{'above' if spec.metadata['above'] else 'at least'} {low:g}"
        most = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{spec.name}: must be {least}{most}, got {value}")
    return number


def check_whole(name: str, value: object, least: int) -> int:
    """How many of something that a call is to make, as a Python int; `MOST` is the limit.

    Raises:
        ValueError, TypeError: naming the argument.

    >>> check_whole("seeds", 5, least=1)
    5
    """
    number = int(_number(name, value, whole=True))
    if number < least:
        raise ValueError(f"{name}: must be at least {least}, got {number}")
    if number > MOST:
        raise ValueError(f"{name}: must be at most {MOST}, got {number}")
    return number


def check_seconds(name: str, value: object) -> float:
    """A time in seconds, ≥ 0, as a Python float; inf is never.

    Raises:
        ValueError, TypeError: naming the argument.

    >>> check_seconds("save_every", 10)
    10.0
    """
    seconds = _real(name, value)
    if not seconds >= 0:
        raise ValueError(f"{name}: must be at least 0 seconds, got {seconds}")
    return seconds


def _number(name: str, value: object, whole: bool = False) -> float | int:
    """A finite number in Python's own type."""
    number = _real(name, value, whole)
    if not math.isfinite(number):
        raise ValueError(f"{name}: must be finite, got {number}")
    return number


def _real(name: str, value: Any, whole: bool = False) -> float | int:
    """A number of any kind, in Python's own type."""
    if isinstance(value, np.ndarray | torch.Tensor) and math.prod(value.shape) == 1 and _plain(value):
        value = value.item()
    kinds: Any = numbers.Integral if whole else numbers.Real  # NumPy's too
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: must be a{' whole' if whole else ''} number, got {type(value).__name__} ({value!r})")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: must be within a float's range") from None
    return int(value) if whole else number


def _plain(value: "np.ndarray[Any, Any] | torch.Tensor") -> bool:
    """Whether it is a number and no more: a tensor may be without a value, or want a gradient."""
    return isinstance(value, np.ndarray) or not (value.is_meta or value.requires_grad)
