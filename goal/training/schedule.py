"""Objectives that change during training: schedules, and a curriculum of stages.

A schedule is any callable, step → value. The caller of `step()` decides what a step is, a step of the optimiser or an
epoch. The state of a schedule is only its progress, which `state_dict()` contains.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import goal
from goal.validation import real_number, whole_number


class Schedule:
    """A value for each step, and the steps at which something new comes up, which `Scheduled` tries beforehand.

    Schedules are numbers and names, no functions within functions: they can be copied, pickled and sent to workers.
    """

    @property
    def turns(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __call__(self, step: int) -> Any:
        raise NotImplementedError


def linear(start: float, end: float, steps: int) -> Schedule:
    """start + (end − start) · min(step / steps, 1).

    Args:
        start, end: finite numbers.
        steps: >= 1.

    Raises:
        ValueError, TypeError: for anything else.

    Example:
        >>> from goal.training import linear
        >>> tau = linear(5.0, 20.0, steps=100)
        >>> tau(0), tau(50), tau(1000)
        (5.0, 12.5, 20.0)
    """
    return _Ramp("linear", start, end, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """start + (end − start) · (1 − cos(π min(step / steps, 1))) / 2: level at both ends. Arguments as for `linear`.

    Example:
        >>> from goal.training import cosine
        >>> round(cosine(0.0, 0.2, steps=100)(25), 4)
        0.0293
    """
    return _Ramp("cosine", start, end, steps)


def piecewise(values: Mapping[int, Any]) -> Schedule:
    """Each value from its step on. A schedule among the values counts from there.

    Args:
        values: {step: value}, from step 0 on; a value is anything: a number, a name, a term, a schedule.

    Raises:
        ValueError: a key that is no step, or none at 0.

    Example:
        >>> from goal.training import linear, piecewise
        >>> mining = piecewise({0: "semi-hard", 1000: "hardest"})
        >>> mining(999), mining(1000)
        ('semi-hard', 'hardest')
        >>> piecewise({0: 5.0, 100: linear(5.0, 20.0, steps=50)})(125)
        12.5
    """
    pieces = {whole_number("piecewise: a key", begin, 0): value for begin, value in values.items()}
    if 0 not in pieces:
        raise ValueError(f"piecewise must say what holds from step 0 on, got {sorted(pieces)}.")
    return _Pieces(dict(sorted(pieces.items())))


def varying(make: Callable[..., Any], **parameters: Any) -> Schedule:
    """A term or a mining whose parameters are schedules: step → make(parameter at that step, …).

    Args:
        make: `goal.T.con`, `goal.P.sig`, `goal.mining.selective`, …
        **parameters: its own; numbers or schedules.

    Raises:
        TypeError: a parameter that it does not have.

    Example:
        >>> import goal
        >>> from goal.training import linear, varying
        >>> varying(goal.T.con, margin=linear(0.0, 0.2, steps=100))(50)
        T.con(margin=0.1)
    """
    schedule = _Varying(make, parameters)
    _at(schedule, 0)
    return schedule


class Scheduled(goal.Objective):
    """A `goal.Objective` of which any argument may be a schedule, a callable step → value.

    It stands at step 0 when it is made. A number that changes is a run-time number: nothing is compiled again.

    Args:
        T, P, **arguments: as for `goal.Objective`, or schedules of them.

    Attributes:
        done: the step at which it stands.

    Raises:
        ValueError, TypeError: an unknown name or a value out of range, with its step. What `linear`, `cosine` and
            `piecewise` come to is tried at construction, what other callables give when it comes up.

    Example:
        >>> import goal
        >>> from goal.training import Scheduled, linear, piecewise, varying
        >>> objective = Scheduled(
        ...     T=varying(goal.T.cir, tau=linear(5.0, 20.0, steps=100)),
        ...     P="lin",
        ...     mining=piecewise({0: "semi-hard", 50: "hardest"}),
        ... )
        >>> objective.at(60)
        Scheduled(cir(tau=14) × lin)
    """

    def __init__(self, T: Any = "cir", P: Any = "sig-ms", **arguments: Any) -> None:
        schedules, scale = {"T": T, "P": P, **arguments}, arguments.get("scale")
        if callable(scale) and "step" not in inspect.signature(scale).parameters:
            schedules["scale"] = _Constant(scale)  # a function of the objective's numbers
        values = {name: _at(value, 0) for name, value in schedules.items()}
        _made(values, 0)
        super().__init__(**values)
        self.schedules, self.values, self.done = schedules, values, 0
        for turn in sorted({turn for value in schedules.values() for turn in _turns(value)}):
            _made({name: _at(value, turn) for name, value in schedules.items()}, turn)

    def at(self, step: int) -> Scheduled:
        """The same objective, at that step.

        Raises:
            ValueError, TypeError: no step, or a value there that is not allowed.
        """
        step = whole_number("step", step, 0)
        values = {name: _at(value, step) for name, value in self.schedules.items()}
        if values != self.values:
            self._bind(_made(values, step).settings)
            self.values = values
        self.done = step
        return self

    def step(self) -> None:
        """On to the next step."""
        self.at(self.done + 1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.done, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.at(int(state))


# ---- a curriculum ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plateau:
    """A stage ends when the value handed to `Curriculum.step`, the higher the better, has had no new best for so long.

    Args:
        patience: calls of `step` without a new best, >= 1.

    Example:
        >>> from goal.training import Plateau
        >>> Plateau(patience=5)
        Plateau(patience=5)
    """

    patience: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "patience", whole_number("patience", self.patience, 1))


@dataclass(frozen=True)
class FewSemiHard:
    """A stage of semi-hard mining ends when less than a share of the anchors has had a semi-hard negative for so long.

    Args:
        share: of the 2K anchors, 0 < share <= 1.
        patience: calls of `step` in a row, one for each batch, >= 1.

    Example:
        >>> from goal.training import FewSemiHard
        >>> FewSemiHard(share=0.1)
        FewSemiHard(share=0.1, patience=10)
    """

    share: float
    patience: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "patience", whole_number("patience", self.patience, 1))
        object.__setattr__(self, "share", real_number("share", self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be within (0, 1], got {self.share!r}.")


Until = int | Plateau | FewSemiHard


class Curriculum(nn.Module):
    """Objectives one after the other; it never goes back.

    Args:
        stages: objectives, at least one; all are called with the same arguments. One that is `Scheduled` counts its
            steps from its own beginning.
        until: for each but the last, when it ends: after so many calls of `step` (steps or epochs), on a `Plateau`, or
            with `FewSemiHard` negatives left.

    Attributes:
        stage: the number of the stage at hand, from 0.

    Raises:
        ValueError, TypeError: not one `until` less than stages; a number that is not allowed; `FewSemiHard` after a
            stage that mines no semi-hard negatives.

    Example:
        >>> import goal
        >>> from goal.candidates import Augmented
        >>> from goal.training import Curriculum, FewSemiHard
        >>> hinge = {"T": goal.T.con(margin=0.2), "P": "con"}
        >>> objective = Curriculum(
        ...     [goal.Objective(**hinge, mining="semi-hard"), Augmented(goal.Objective(**hinge), "interpolate", n=2)],
        ...     until=[FewSemiHard(share=0.1)],
        ... )
        >>> objective.stage
        0

    Source: the two stages, from semi-hard triplets to the hardest among augmented embeddings, are those of Zeng &
    Ikeda, "Two-Stage Triplet Loss Training with Curriculum Augmentation for Audio-Visual Retrieval", 2023. When to
    switch is ours.
    """

    def __init__(self, stages: Sequence[nn.Module], until: Sequence[Until]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.until = tuple(
            end if isinstance(end, Plateau | FewSemiHard) else whole_number(f"until[{number}]", end, 1)
            for number, end in enumerate(until)
        )
        if len(self.until) != len(stages) - 1:
            raise ValueError(f"until must have one entry less than stages, got {len(self.until)} for {len(stages)}.")
        for number, (stage, end) in enumerate(zip(stages, self.until, strict=False)):
            if isinstance(end, FewSemiHard) and _mining(stage) != "semi-hard":
                raise ValueError(f"until[{number}]: stage {number} mines no semi-hard negatives ({stage}).")
        self.stage = 0
        self._restart()

    def _restart(self) -> None:
        """At the beginning of a stage."""
        self.done = 0  # steps of this stage
        self.best = -math.inf
        self.stale = 0  # steps since there was a new best, or with few semi-hard negatives

    @property
    def current(self) -> Any:
        """The objective at hand."""
        return self.stages[self.stage]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The objective at hand, called."""
        return self.current(*args, **kwargs)

    def apply_similarity(self, *args: Any, **kwargs: Any) -> Any:
        """That of the objective at hand."""
        return self.current.apply_similarity(*args, **kwargs)

    @property
    def settings(self) -> Any:
        """Those of the objective at hand."""
        return self.current.settings

    @property
    def stats(self) -> Any:
        """`goal.Stats` of the last call of the objective at hand."""
        return self.current.stats

    def step(self, value: float | None = None) -> bool:
        """Count a step, and go on to the next stage if this one has ended.

        Args:
            value: what a `Plateau` looks at, the higher the better; for a loss, −loss. NaN and inf are no new best. Of
                `FewSemiHard` it is the share of anchors with a semi-hard negative, by default that of `stats`, which
                with `group=` are one rank's.

        Returns:
            Whether another stage begins.

        Raises:
            ValueError: there is no value, and a `Plateau` needs one.
        """
        end = self.until[self.stage] if self.stage < len(self.until) else None
        if isinstance(end, Plateau):
            if value is None:
                raise ValueError(f"stage {self.stage} ends on a plateau: call step(value).")
            better = self.best < value < math.inf  # inf would be the best for good
            self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        elif isinstance(end, FewSemiHard):
            left = (self.stats.index >= 0).double().mean().item() if value is None else value
            self.stale = self.stale + 1 if left < end.share else 0
        self.done += 1
        for module in self.current.modules():
            if isinstance(module, Scheduled):
                module.step()
        ended = end is not None and (self.done >= end if isinstance(end, int) else self.stale >= end.patience)
        if ended:
            self.stage += 1
            self._restart()
        return ended

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.stage, self.done, self.best, self.stale], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        stage, done, best, stale = state.tolist()
        self.stage, self.done, self.best, self.stale = int(stage), int(done), best, int(stale)

    def extra_repr(self) -> str:
        return f"until={list(self.until)}, stage={self.stage}"


# ---- how it is done --------------------------------------------------------------------------------------

_TERMS = (type(goal.T["con"]), type(goal.T["con"]()))  # callable too, but no schedules


def _is_schedule(value: object) -> bool:
    return callable(value) and not isinstance(value, _TERMS)


def _value(value: Any, step: int) -> Any:
    return value(step) if _is_schedule(value) else value


def _turns(value: Any) -> tuple[int, ...]:
    return value.turns if isinstance(value, Schedule) else (0,)


def _at(value: Any, step: int) -> Any:
    """A schedule's value; an error names the step."""
    try:
        return _value(value, step)
    except (TypeError, ValueError) as error:
        raise _named(error, step) from error


def _made(values: dict[str, Any], step: int) -> goal.Objective:
    try:
        return goal.Objective(**values)
    except (TypeError, ValueError) as error:
        raise _named(error, step) from error


def _named(error: Exception, step: int) -> Exception:
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"step {step}: {error}")


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From one number to another."""

    shape: str  # "linear" or "cosine"
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_number(f"{self.shape}: steps", self.steps, 1))
        for name in ("start", "end"):
            object.__setattr__(self, name, real_number(f"{self.shape}: {name}", getattr(self, name)))

    @property
    def turns(self) -> tuple[int, ...]:
        return 0, self.steps

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        part = step / self.steps
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.start + (self.end - self.start) * part

    def __repr__(self) -> str:
        return f"{self.shape}({self.start}, {self.end}, steps={self.steps})"


@dataclass(frozen=True)
class _Pieces(Schedule):
    """One value after another."""

    values: dict[int, Any]  # by their first steps, ascending

    @property
    def turns(self) -> tuple[int, ...]:
        return tuple(begin + turn for begin, value in self.values.items() for turn in _turns(value))

    def __call__(self, step: int) -> Any:
        begin = max(begin for begin in self.values if begin <= step)
        return _value(self.values[begin], step - begin)

    def __repr__(self) -> str:
        return f"piecewise({self.values})"


@dataclass(frozen=True)
class _Constant(Schedule):
    """A function that is a value itself."""

    value: Callable[..., Any]

    @property
    def turns(self) -> tuple[int, ...]:
        return ()

    def __call__(self, step: int) -> Any:
        return self.value


@dataclass(frozen=True)
class _Varying(Schedule):
    """What is made with parameters that are schedules."""

    make: Callable[..., Any]
    parameters: dict[str, Any]

    @property
    def turns(self) -> tuple[int, ...]:
        return tuple(sorted({0, *(turn for value in self.parameters.values() for turn in _turns(value))}))

    def __call__(self, step: int) -> Any:
        return self.make(**{name: _value(value, step) for name, value in self.parameters.items()})

    def __repr__(self) -> str:
        made = repr(_value(self, 0)).partition("(")[0]
        return f"varying({', '.join([made, *(f'{name}={value!r}' for name, value in self.parameters.items())])})"


def _mining(objective: nn.Module) -> str | None:
    settings = getattr(objective, "settings", None)
    return None if settings is None else settings.mining.name
