"""Everything that decides the result of a run, in one frozen object."""

import dataclasses
import hashlib
import inspect
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import nn

import goal

Parameters = dict[str, float | None]
Kind = Literal["T", "P"]
KINDS: tuple[Kind, ...] = ("T", "P")


def _option(default: Any, help: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A field with its help text and its range, [low, high] or (low, high]."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: the objective, the data, the heads, the optimiser, when to stop, and how to compute.

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
    T: str | None = _option(None, "triplet weight (default: cir)")
    P: str | None = _option(None, "pair weight (default: sig-ms)")
    recipe: str | None = _option(None, "a recipe of the literature, in place of T and P")
    mining: str | None = _option(None, "which negatives T × P meets (default: hardest)")
    params: dict[str, float] = field(default_factory=dict, hash=False)  # tau, margin, …; defaults are filled in
    # the data
    data: str = _option("emoji", "the built-in emoji, or a folder of features")
    limit: int | None = _option(None, "train on the first images only, to try things on a slice", low=1)
    seed: int = _option(0, "of the first weights, the batches and the dropout", low=0)
    # the heads
    hidden: int = _option(1024, "width of the hidden layer", low=1)
    dim: int = _option(512, "dimensions of the embedding", low=1)
    dropout: float = _option(0.3, "share of hidden units dropped", low=0, high=1)
    # the optimiser
    batch: int = _option(128, "images in a batch, each with one of its captions", low=2)
    lr: float = _option(5e-4, "learning rate of AdamW", low=0, above=True)
    weight_decay: float = _option(0.01, "of AdamW, on the heads", low=0)
    warmup: int = _option(100, "steps over which the learning rate rises linearly", low=0)
    clip: float = _option(2.0, "largest norm of the gradient", low=0, above=True)
    average: float = _option(0.98, "share that the running mean of the weights, which is tested, keeps", low=0, high=1)
    # when the rate drops and when to stop: by validation RSUM alone
    max_steps: int = _option(6000, "steps after which training ends in any case", low=1)
    eval_every: int = _option(50, "steps between two evaluations on the validation split", low=1)
    patience: int = _option(12, "evaluations without a new best after which the rate drops, or training ends", low=1)
    drops: int = _option(1, "how often the learning rate drops before a plateau ends training", low=0)
    drop: float = _option(0.1, "factor of a drop, which also goes back to the best weights", low=0, high=1, above=True)
    # how it is computed
    dtype: str = _option("float32", "of the heads' products: float32 or bfloat16")
    device: str = _option("cpu", "where to compute")
    threads: int = _option(1, "threads of one run", low=1)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name != "params":
                object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: must be float32 or bfloat16, got {self.dtype!r}")
        _check_device(self.device)
        if self.recipe is not None:
            if given := [name for name in ("T", "P", "mining") if getattr(self, name) is not None]:
                raise ValueError(f"recipe: {self.recipe!r} stands in place of T, P and mining; got {given[0]} too")
        else:
            for name, default in zip(KINDS, ("cir", "sig-ms"), strict=True):
                object.__setattr__(self, name, _definition(name, getattr(self, name) or default).name)
            object.__setattr__(self, "mining", self.mining or "hardest")
        own = _parameters(self._base())
        if stray := sorted(set(self.params) - set(own)):
            raise ValueError(f"params: {self.label} has no {stray[0]!r}; known: {', '.join(own) or 'none'}")
        checked = {name: _number(f"params[{name!r}]", value) for name, value in self.params.items()}
        params = {name: float(value) for name, value in {**own, **checked}.items() if value is not None}
        object.__setattr__(self, "params", params)
        self.objective()

    def objective(self) -> nn.Module:
        """The objective itself, its parameters bound; NaN passes into its gradient, where the loop sees it."""
        base = self._base()
        if not isinstance(base, goal.Objective):
            return goal.recipe(str(self.recipe), **self.params)
        bound: dict[str, Any] = {
            kind: term.definition(**term.params | {k: v for k, v in self.params.items() if k in term.params})
            for kind, term in _terms(base).items()
        }
        if self.recipe is not None:
            return goal.recipe(self.recipe, **bound, check_finite=False)
        return goal.Objective(**bound, mining=str(self.mining), check_finite=False)

    def _base(self) -> nn.Module:
        if self.recipe is not None:
            return goal.recipe(self.recipe)
        T, P = (_definition(name, str(getattr(self, name))) for name in KINDS)
        return goal.Objective(T, P, mining=str(self.mining))

    @property
    def label(self) -> str:
        """How tables call the objective."""
        return self.recipe or f"{self.T} × {self.P}" + (f", {self.mining}" if self.mining != "hardest" else "")

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
        readable = self.label.replace(" × ", "-").replace(", ", "-")
        return f"{readable}-s{self.seed}-{self.digest}"

    def to_json(self) -> str:
        """As JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: no JSON, or a field that does not exist.
        """
        values = json.loads(text)
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


def _check_device(device: str) -> None:
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: must be cpu, cuda or cuda:1 and so on, got {device!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch that was built without
        raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _terms(objective: goal.Objective) -> dict[str, Any]:
    product = objective.settings.product
    return {"T": product.T, "P": product.P}


def _parameters(objective: nn.Module) -> Parameters:
    """The numbers that an objective takes, by name."""
    if isinstance(objective, goal.Objective):
        params = [item for term in _terms(objective).values() for item in term.params.items()]
        return {name: value for name, value in params if not isinstance(value, bool)}
    return {name: p.default for name, p in inspect.signature(type(objective)).parameters.items()}


def _checked(spec: "dataclasses.Field[Any]", value: object) -> object:
    """A field's value in its own type and range."""
    kind, low, high = str(spec.type), spec.metadata["low"], spec.metadata["high"]
    optional = "None" in kind
    if value is None and optional:
        return None
    if "str" in kind:
        if not isinstance(value, str):
            raise TypeError(f"{spec.name}: must be text, got {type(value).__name__} ({value!r})")
        return value
    whole = "int" in kind
    number = _number(spec.name, value, whole)
    if not low <= number <= high or (spec.metadata["above"] and number == low):
        least = f"{'above' if spec.metadata['above'] else 'at least'} {low:g}"
        most = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{spec.name}: must be {least}{most}, got {value}")
    return number


def _number(name: str, value: object, whole: bool = False) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name}: must be a{' whole' if whole else ''} number, got {type(value).__name__} ({value!r})")
    if not math.isfinite(value):
        raise ValueError(f"{name}: must be finite, got {value}")
    return int(value) if whole else float(value)
