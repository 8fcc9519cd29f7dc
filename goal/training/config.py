"""The configuration of a run: every setting that decides its result, in a frozen object of four sections.

    objective   the objective as a spec, and its stages
    model       the model and its width
    optimiser   batches and steps
    stopping    when to evaluate on the validation split, and when to stop

Python, the command line and configuration files share a reader, `TrainConfig(**settings)`. A setting may be given in
its section or, since all names differ, on its own: `optimiser={"lr": 1e-3}` or `lr=1e-3`.
"""

import dataclasses
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import nn

import goal
from goal.candidates import Augmented
from goal.data.files import check_file, readable
from goal.names import Named, nearest, unknown
from goal.spec import Spec, named, parse
from goal.training.schedule import Curriculum, FewSemiHard, Plateau, Until
from goal.training.systems import DEFAULT, SYSTEMS, System
from goal.validation import real_number, whole_number

WIDEST = 1 << 16  # of a layer: more is a slip, and would go to the allocator
LONGEST = 4096  # characters of a text: what the paths of most systems may have
MOST = 10**6  # seeds, trials, workers, …
NAMING = ("spec", "name")  # fields that are called as their section is, where they stand on their own
COUNT = re.compile(r"0*[1-9]\d{0,8}")


def _option(default: Any, help: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A field with its help text and its range, [low, high] or (low, high]."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})


def _of_model(help: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A field whose default is the model's, in `SYSTEMS`."""
    help = f"{help} (default: the model's)"
    its = {"help": help, "low": low, "high": high, "above": above, "of_model": True}
    return dataclasses.field(default=None, metadata=its)


class _Section:
    """Fields that are checked by their annotations and ranges; None is the model's."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(cast(Any, self)):
            shown = _section(type(self)) if field.name in NAMING else field.name
            checked = _checked(shown, hints[field.name], field.metadata, getattr(self, field.name))
            object.__setattr__(self, field.name, checked)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(_Section):
    """What emits the gradient."""

    spec: Spec = _of_model("cir × sig-ms, vse++, … as text: see goal.objective")  # noqa: RUF009
    all_first: int = _of_model("first epochs in which T × P meets all negatives (VSE∞'s warm-up)", low=0)
    curriculum: Literal["plain", "interpolate", "mixup"] | None = _option(
        None, "two stages: semi-hard, then hardest: plain, or among made rows, interpolate or mixup"
    )
    switch: str = _option("plateau", "when they change: plateau, few-semi-hard, or after so many evaluations")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """What embeds; a size that a model does not have is None."""

    name: str = _option(DEFAULT, "heads on frozen features, or a system of the literature: see goal models")
    texts: str = _of_model("captions as words, or their given features")
    hidden: int | None = _of_model("width of the hidden layer", low=1, high=WIDEST)
    dim: int = _of_model("dimensions of the embedding", low=1, high=WIDEST)
    word_dim: int | None = _of_model("dimensions of a word's embedding", low=1, high=WIDEST)
    dropout: float | None = _of_model("share of hidden units dropped", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(_Section):
    """Batches and steps."""

    name: Literal["Adam", "AdamW"] = _of_model("Adam or AdamW")
    batch: int = _of_model("images in a batch, of all ranks together, each with one of its captions", low=2)
    lr: float = _of_model("learning rate", low=0, above=True)
    weight_decay: float = _of_model("of the model's weights", low=0)
    warmup: int = _of_model("steps over which the learning rate rises linearly", low=0)
    clip: float = _of_model("largest norm of the gradient", low=0, above=True)
    average: float = _of_model("share that the running mean of the weights, which is tested, keeps", low=0, high=1)
    drop_epoch: int | None = _of_model("epoch from which the rate is lower, counted from 0", low=0)
    drops: int = _of_model("how often the learning rate drops before a plateau ends training", low=0)
    drop: float = _option(
        0.1, "factor of a drop; one at a plateau also goes back to the best weights", low=0, high=1, above=True
    )


@dataclass(frozen=True, kw_only=True)
class StoppingConfig(_Section):
    """When to look at the validation split, and when to end."""

    epochs: int = _of_model("times that all captions fill batches once; 0: until a plateau", low=0)
    max_steps: int | None = _of_model("steps after which training ends in any case", low=1)
    eval_every: int = _of_model("steps between two evaluations on the validation split; 0: an epoch", low=0)
    patience: int | None = _of_model(
        "evaluations without a new best after which the rate drops, training ends, or stages change", low=1
    )


@dataclass(frozen=True, kw_only=True, init=False)
class TrainConfig:
    """One training run: the objective, the data, the model, the optimiser, when to stop, and how to compute.

    Args:
        **settings: by section, `optimiser={"lr": 1e-3}`, or by name, `lr=1e-3`, which goes over its section. A section
            that is a text is what it names: `objective="vse++"`, `model="scan"`, `optimiser="Adam"`. In place of
            `objective`: `T`, `P` and `mining`, or `recipe`, with `params` by name, and `reduction`. What is left out
            is the model's: `heads` are ours, the others are trained as they were published.

    Two runs with equal configurations on one machine, with the same versions and data, end with bit-equal results.

    Raises:
        ValueError, TypeError: an unknown name, a value out of range or of the wrong type, at construction.

    >>> config = TrainConfig(objective="cir(tau=5) × sig_ms | semi-hard(margin=0.1)", lr=1e-3)
    >>> config.params
    {'tau': 5.0, 'alpha': 2.0, 'beta': 10.0, 'lam': 0.5, 'mining.margin': 0.1}
    >>> config.label, config.optimiser.lr
    ('cir(tau=5) × sig-ms | semi-hard(margin=0.1)', 0.001)
    >>> TrainConfig.from_json(config.to_json()) == config
    True
    """

    objective: ObjectiveConfig
    model: ModelConfig
    optimiser: OptimiserConfig
    stopping: StoppingConfig
    data: str = _option("emoji", "the built-in emoji, or a folder of features")
    limit: int | None = _option(None, "train on the first images only, to try things on a slice", low=1)
    seed: int = _option(0, "of the first weights, the batches and the dropout", low=0, high=2**63 - 1)
    dtype: Literal["float32", "bfloat16"] = _option("float32", "of the model's products: float32 or bfloat16")
    device: str = _option("cpu", "where to compute")
    threads: int = _option(1, "threads of one run", low=1, high=1024)

    def __init__(self, **settings: Any) -> None:
        given = {name: value for name, value in flat(settings).items() if value is not None}
        model = SETTINGS["model"].checked("model", given.get("model", DEFAULT))
        if model not in SYSTEMS:
            raise unknown("model", model, list(SYSTEMS))
        system = SYSTEMS[str(model)]
        for size in ("hidden", "dim", "word_dim", "dropout"):
            if size in given and size not in system.settings:
                raise ValueError(f"{size} cannot be set: model {model} has none, got {given[size]!r}.")
        defaults = {**system.settings, "texts": system.texts[0]}
        values = {**defaults, **given, "model": model, "objective": _spec(given, system)}
        for section, kind in SECTIONS.items():
            its = {
                each.field.name: values[name]
                for name, each in SETTINGS.items()
                if each.section == section and name in values
            }
            object.__setattr__(self, section, kind(**its))
        for name, each in SETTINGS.items():
            if each.section is None:
                object.__setattr__(self, name, each.checked(name, values.get(name, each.field.default)))
        self._check(system)

    def _check(self, system: System) -> None:
        """What no field says on its own."""
        if self.model.texts not in system.texts:
            raise unknown("texts", self.model.texts, system.texts)
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu, cuda or cuda:1 and so on, got {self.device!r}.")
        stopping, its = self.stopping, self.objective
        if not stopping.epochs and stopping.patience is None and stopping.max_steps is None:
            raise ValueError(
                "epochs must be >= 1 without patience, got 0: training goes on until a plateau, which needs it."
            )
        if its.all_first and stopping.eval_every:
            raise ValueError(f"all_first counts epochs, with eval_every=0, got eval_every={stopping.eval_every}.")
        if its.curriculum is not None:
            self._check_stages(system)
        self.build_objective()

    def _check_stages(self, system: System) -> None:
        """Whether the stages that are asked for can follow one another."""
        its = self.objective
        if system.gives == "similarities" and its.curriculum != "plain":
            raise ValueError(
                f"curriculum must be plain: {self.model.name} makes similarities, and rows are made of embeddings."
            )
        if _mining(its.spec.build()) is None:
            raise ValueError(f"curriculum cannot be set: {its.spec} mines nothing.")
        if its.switch == "plateau" and self.stopping.patience is None:
            raise ValueError("switch must not be plateau without patience, which is None.")
        if its.switch == "few-semi-hard" and its.all_first:
            raise ValueError(
                "switch must not be few-semi-hard, which counts steps, beside all_first, which counts epochs; "
                "give all_first=0."
            )
        if its.switch not in ("plateau", "few-semi-hard") and not COUNT.fullmatch(its.switch):
            allowed = "plateau, few-semi-hard or a number of evaluations below 10⁹"
            raise ValueError(f"switch must be {allowed}, got {its.switch[:80]!r}.")

    def build_objective(self, group: str | None = None) -> nn.Module:
        """The objective itself, its parameters bound; NaN passes into its gradient, where the loop sees it.

        Args:
            group: of ranks whose batches are one, for a model under `DistributedDataParallel`; see `goal.apply`.
        """
        its = self.objective
        rest: dict[str, Any] = {"group": group, "averaged": group is not None, "check_finite": False}
        last: nn.Module = its.spec.build(**rest)
        rule = _mining(last)
        if rule is None:
            return last
        stages: list[nn.Module] = []
        until: list[Until] = []
        if its.all_first and rule.dense != "always":
            stages.append(its.spec.with_axes(mining="all(average=false)").build(**rest))
            until.append(its.all_first)
        if its.curriculum is not None:
            stages.append(its.spec.with_axes(mining="semi-hard").build(**rest))
            until.append(self._switch())
            hardest = cast(goal.Objective, its.spec.with_axes(mining="hardest").build(**rest))
            last = hardest if its.curriculum == "plain" else Augmented(hardest, its.curriculum)
        stages.append(last)
        return Curriculum(stages, until) if until else stages[0]

    def _switch(self) -> Until:
        switch = self.objective.switch
        if switch == "few-semi-hard":
            return FewSemiHard(share=0.1)
        return Plateau(int(self.stopping.patience or 1)) if switch == "plateau" else int(switch)

    def definitions(self) -> dict[str, str]:
        """What tells terms of the user's own from others of their names: digests of their code."""
        base = self.objective.spec.build()
        product = base.settings.product if isinstance(base, goal.Objective) else None
        terms = {} if product is None else {"T": product.T, "P": product.P}
        functions = {kind: t.definition.function for kind, t in terms.items() if not t.name.startswith("found-")}
        return {kind: _code(f) for kind, f in functions.items() if not str(f.__module__).startswith("goal.")}

    def replace(self, **changes: Any) -> Self:
        """The same with other settings, by section or by name.

        >>> TrainConfig().replace(lr=0.01, params={"tau": 5}).label
        'cir(tau=5) × sig-ms'
        """
        return type(self)(**merged(self.values(), changes))

    @property
    def params(self) -> dict[str, float | bool]:
        """The parameters of the objective, those at their defaults among them: what a search may change."""
        return self.objective.spec.parameters

    @property
    def label(self) -> str:
        """How tables call the objective."""
        return self._label(str)

    def _label(self, show: Callable[[Spec], str]) -> str:
        spec, curriculum = self.objective.spec, self.objective.curriculum
        return show(spec) if curriculum is None else f"{show(spec.with_axes(mining=None))}, curriculum {curriculum}"

    @property
    def setting(self) -> str:
        """The model and how it is trained, for the note under a table."""
        model, optimiser = self.model, self.optimiser
        size = f"{model.hidden} → {model.dim}" if model.hidden else f"of {model.dim} dimensions"
        long = f", {self.stopping.epochs} epochs" if self.stopping.epochs else ""
        return f"{model.name} {size}, batch {optimiser.batch}, {optimiser.name} at {optimiser.lr:g}{long}"

    @property
    def names(self) -> dict[str, str | None]:
        """T, P, recipe and label as a record carries them: "-" for a recipe's T and P."""
        spec = self.objective.spec
        terms = {"T": str(spec.T), "P": str(spec.P)} if spec.recipe is None else {"T": "-", "P": "-"}
        return {**terms, "recipe": None if spec.recipe is None else str(spec.recipe), "label": self.label}

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that change with every field."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def run_stem(self) -> str:
        """How the name of the run's folder begins: readable, the same for other parameters."""
        system = "" if self.model.name == DEFAULT else f"{self.model.name}-"

        def short(spec: Spec) -> str:
            return (spec.with_axes(mining=None) if spec.axis("mining") == Named("hardest") else spec).names

        return f"{system}{readable(self._label(short))}-s{self.seed}-"

    @property
    def run_name(self) -> str:
        """Name of the run's folder, another one for every configuration."""
        return f"{self.run_stem}{self.digest}"

    def values(self) -> dict[str, Any]:
        """All settings by their sections, as JSON holds them."""
        found: dict[str, Any] = {}
        for name, each in SETTINGS.items():
            if each.section is None:
                found[name] = getattr(self, name)
            else:
                value = getattr(getattr(self, each.section), each.field.name)
                found.setdefault(each.section, {})[each.field.name] = str(value) if isinstance(value, Spec) else value
        return found

    def to_json(self) -> str:
        """As JSON, for `from_json`."""
        return json.dumps(self.values(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote, now or when settings were not yet in sections.

        Raises:
            ValueError: no JSON, or a setting that does not exist.
        """
        return cls(**_object("a configuration", _decoded("a configuration", json.loads, text)))

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """The configuration of a .toml or .json file, with changes.

        Raises:
            ValueError, TypeError: the file is not there or of another form; as for the constructor.
        """
        return cls(**merged(read_settings(path), changes))


# ── settings by their names ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Setting:
    """A field of `TrainConfig` or of one of its sections."""

    section: str | None
    field: "dataclasses.Field[Any]"
    hint: Any  # its annotation

    def checked(self, name: str, value: object) -> Any:
        return _checked(name, self.hint, self.field.metadata, value)


def _section(kind: type) -> str:
    return kind.__name__.removesuffix("Config").lower()


def _settings() -> Iterator[tuple[str, Setting]]:
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name not in SECTIONS:
            yield field.name, Setting(None, field, hints[field.name])
            continue
        inside = typing.get_type_hints(SECTIONS[field.name])
        for each in dataclasses.fields(SECTIONS[field.name]):
            yield field.name if each.name in NAMING else each.name, Setting(field.name, each, inside[each.name])


SECTIONS: dict[str, Any] = {
    _section(kind): kind for kind in (ObjectiveConfig, ModelConfig, OptimiserConfig, StoppingConfig)
}
SETTINGS: dict[str, Setting] = dict(_settings())
ALIASES = {"optimizer": "optimiser"}
CHOICES = ("recipe", "T", "P")  # in place of `objective`
WORDS = (*CHOICES, "mining", "reduction", "params")  # that change it


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their own names, those in sections among them; a name on its own goes over its section.

    >>> flat({"optimizer": {"lr": 1.0, "clip": 2.0}, "lr": 0.5, "model": "scan"})
    {'lr': 0.5, 'clip': 2.0, 'model': 'scan'}
    """
    inside: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for given, value in settings.items():
        name = ALIASES.get(given, given)
        kind = SECTIONS.get(name)
        if kind is not None and isinstance(value, kind):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
        if kind is not None and isinstance(value, Mapping):
            known = [field.name for field in dataclasses.fields(kind)]
            if stray := [key for key in value if key not in known]:
                raise _no_setting(name, stray[0], known)
            inside |= {name if key in NAMING else key: entry for key, entry in value.items()}
        elif name in SETTINGS or name in WORDS:
            alone[name] = value
        elif kind is not None:
            raise TypeError(f"{name} must be settings by name, got {type(value).__name__} ({value!r}).")
        else:
            raise _no_setting("a configuration", given, [*SECTIONS, *SETTINGS, *WORDS])
    return inside | alone


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes; where these choose an objective, the earlier choice goes."""
    before, after = flat(settings), flat(changes)
    if any(after.get(name) is not None for name in ("objective", *CHOICES)):
        before = {name: value for name, value in before.items() if name not in ("objective", *WORDS)}
    return before | after


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a .toml or .json file, by section or by name.

    Raises:
        ValueError: no such file, or one of another form.
    """
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"{path}: must be a .toml or a .json file.")
    return _object(str(path), _decoded(str(path), readers[path.suffix], check_file(path).read_bytes()))


def _decoded(what: str, decode: Callable[[str], Any], text: str | bytes) -> Any:
    try:
        return decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # no JSON or TOML, no UTF-8, or too deep
        raise ValueError(f"{what}: cannot be read: {error}") from error


def _object(what: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{what}: must hold settings by name, got {type(values).__name__}.")
    return values


def _no_setting(where: str, name: object, known: Sequence[str]) -> ValueError:
    return ValueError(f"{where} has no setting {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")


# ── the objective ───────────────────────────────────────────────────────────────────────────────────────────────────


def _spec(given: Mapping[str, Any], system: System) -> Spec:
    """The objective that settings choose, in full: a model's axes are those that it does not set."""
    found = _chosen(given, system)
    for axis in ("mining", "reduction"):
        if axis in given:
            found = found.with_axes(**{axis: named(axis, _text(axis, given[axis]))})
    params = given.get("params", {})
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be numbers by name, got {type(params).__name__} ({params!r}).")
    found = found.with_parameters({name: value for name, value in params.items() if value is not None})
    cell = dict(system.cell.axes) if found.recipe is None else {}
    found = found.with_axes(**{axis: value for axis, value in cell.items() if found.axis(axis) is None})
    for axis in (name for name, _ in found.axes if name not in cell):
        without = found.with_axes(**{axis: None})
        found = without if repr(without.build()) == repr(found.build()) else found
    return found


def _chosen(given: Mapping[str, Any], system: System) -> Spec:
    """The recipe, or T × P, that settings name."""
    choices = [name for name in ("objective", *CHOICES) if name in given]
    if set(choices) <= {"T", "P"} and (choices or "mining" in given):
        return Spec(T=_part("T", given, system), P=_part("P", given, system))
    if len(choices) > 1:
        first, second = (f"{name}={given[name]!r}" for name in choices[:2])
        raise ValueError(f"{choices[0]} must stand alone, got {first} and {second}.")
    if not choices:
        return system.objective
    value = given[choices[0]]
    found = value if isinstance(value, Spec) else parse(_text(choices[0], value))
    if choices == ["recipe"] and found.recipe is None:
        raise ValueError(f"recipe must be one of goal recipes, got {value!r}: write it as the objective.")
    return found


def _part(kind: Literal["T", "P"], given: Mapping[str, Any], system: System) -> Named:
    """T or P; one that is not named, or is but without parameters, is the model's own."""
    own = getattr(system.cell, kind)
    term = named(kind, _text(kind, given[kind])) if kind in given else own
    return own if term == Named(own.name) else term


def _mining(objective: nn.Module) -> goal.mining.Mining | None:
    """The mining rule of an objective, which other rules can precede; None if it uses all negatives in its own way."""
    rule = objective.settings.mining if isinstance(objective, goal.Objective) else None
    return None if rule is None or rule.softmax is not None else rule


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


# ── devices, and values in their type and range ─────────────────────────────────────────────────────────────────────


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
        raise ValueError(f"device {device!r} is not on this machine, or this PyTorch was built without it.")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows.

    >>> alternatives(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _checked(name: str, hint: Any, its: Mapping[str, Any], value: object) -> Any:
    """A value as its annotation and its range have it; None is the model's where a model may have one."""
    kinds = alternatives(hint)
    if value is None and (types.NoneType in kinds or its.get("of_model")):
        return None
    (kind,) = (each for each in kinds if each is not types.NoneType)
    if kind is Spec:
        return value if isinstance(value, Spec) else parse(_text(name, value))
    if typing.get_origin(kind) is Literal:
        if _text(name, value) not in typing.get_args(kind):
            raise unknown(name, value, typing.get_args(kind))
        return value
    if kind is str:
        return _text(name, value)
    if kind is int:
        return whole_number(name, value, int(its["low"]), 2**63 - 1 if its["high"] == math.inf else int(its["high"]))
    return real_number(name, value, its["low"], its["high"], above=its["above"])


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {type(value).__name__} ({value!r}).")
    if "\0" in value:
        raise ValueError(f"{name} must hold no NUL, got {value!r}.")
    if len(value) > LONGEST:
        raise ValueError(f"{name} must be of at most {LONGEST} characters, got {len(value)}.")
    return value
