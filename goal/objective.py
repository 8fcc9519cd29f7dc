"""`Objective`: an objective as a module, checked once."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from goal import mining, positives, terms
from goal.distributed.exchange import ranks
from goal.engine import settings as engine
from goal.engine.call import Arguments
from goal.engine.path import Seen
from goal.engine.settings import Settings
from goal.functional import run
from goal.names import Named, line, literal
from goal.positives import bind
from goal.similarity import GIVEN
from goal.stats import Stats, stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Objective(nn.Module):
    """`goal.apply` with its arguments bound: ``objective(x, y)`` is the scalar, ``objective.stats`` its statistics.

    Args: as for `goal.apply`; the data are the arguments of the call.

    Raises:
        ValueError, TypeError: for an unknown name or a parameter out of range, at construction.

    Example:
        >>> import goal, torch
        >>> objective = goal.Objective(T=goal.T.con(margin=0.2), P="con", mining="semi-hard")
        >>> x, y = torch.eye(4, requires_grad=True), torch.eye(4)
        >>> objective(x, y).item()
        0.0
        >>> objective.stats.s_pos
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        T: str | terms.Term = "cir",
        P: str | terms.Term = "sig-ms",
        *,
        mining: str | mining.Mining = "hardest",
        positives: str | positives.Positives | None = None,
        reduction: str = "mean",
        scale: engine.Scale = 1.0,
        directions: str = "both",
        similarity: str = "dot",
        impl: str = "auto",
        precision: str = "fast",
        check_finite: bool | None = None,
        group: ProcessGroup | str | None = None,
        averaged: bool = False,
        exchange: str = "gather",
    ) -> None:
        super().__init__()
        rule = bind(positives, False)
        self._bind(engine.settings(T, P, mining, similarity, reduction, impl, precision, scale, directions, rule))
        self._of_set = None if positives is None else rule
        self.check_finite = check_finite
        self.ranks = ranks(group, averaged, exchange)
        self._seen: tuple[Settings, Seen] | None = None

    def _bind(self, settings: Settings) -> None:
        self.settings = settings
        self._numbers = engine.numbers(settings)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The scalar for (N, D) and (M, D) embeddings, or for a single set x with its labels; see `goal.apply`."""
        settings = self.traced
        if y is None:
            settings = dataclasses.replace(settings, positives=bind(self._of_set, True))
        arguments = Arguments(x, y, ids, y_ids, weight, self.check_finite, one_set=y is None)
        loss, seen = run(arguments, settings, self.ranks)
        self._seen = self.settings if y is not None else settings, seen
        return loss

    @property
    def traced(self) -> Settings:
        """The settings; in a compiled graph with all numbers as inputs of the graph and the rest as constants."""
        return engine.renumbered(self.settings, *self._numbers) if torch.compiler.is_compiling() else self.settings

    def apply_similarity(
        self, S: Tensor, ids: Tensor | None = None, y_ids: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The scalar for a similarity matrix (N, M) from a model; see `goal.apply_similarity`.

        The objective's own similarity is not used.
        """
        given = dataclasses.replace(self.settings, similarity=GIVEN)
        loss, seen = run(Arguments(S, None, ids, y_ids, weight, self.check_finite), given)
        self._seen = given, seen
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """The state without the last call, which may contain a process group."""
        return {**self.__dict__, "_seen": None}

    @property
    def stats(self) -> Stats:
        """`goal.Stats` of the last call, computed on request; the objective keeps that call's embeddings for it, a copy
        of the objective does not.

        With `group=` they are those of this rank's anchors, with global indices of negatives; ranks need not ask
        together.
        """
        if self._seen is None:
            raise RuntimeError("stats are those of the last call, and there was none: call objective(x, y) first.")
        with torch.no_grad():
            return stats(*self._seen)

    def extra_repr(self) -> str:
        """The objective as text for `goal.objective`, without what is at its default.

        A term or a mining rule that is another than that of its name prints as Python; ranks are said at the end.
        """
        s = self.settings
        scale = getattr(s.scale, "__name__", repr(s.scale)) if callable(s.scale) else literal(s.scale)
        axes = {
            "mining": _rule(s.mining),
            "positives": _positives(s.positives),
            "similarity": s.similarity.name,
            "reduction": s.reduction,
            "scale": scale,
            "directions": s.directions,
        }
        changed = {axis: text for axis, text in axes.items() if text != literal(_DEFAULTS[axis])}
        spec = line((_text(terms.T, s.product.T), _text(terms.P, s.product.P)), changed)
        return spec if self.ranks is None else f"{spec}, over ranks by {self.ranks.exchange}"


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Objective).parameters.items()}
_DEFAULTS["positives"] = "pair"


def _text(registry: terms.Registry, term: terms.Term) -> str:
    replaced = term.name in registry and registry[term.name] is not term.definition
    return repr(term) if replaced else str(Named.of(term.name, term.params, term.definition.defaults))


def _positives(rule: positives.Positives) -> str:
    return str(Named.of(rule.name, rule.params, positives.defaults(rule.name)))


def _rule(rule: mining.Mining) -> str:
    return str(Named.of(rule.name, rule.params, mining.defaults(rule.name))) if rule.known else repr(rule)
