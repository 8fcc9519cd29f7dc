"""Terms as graphs: a function of similarities is traced once with torch.fx and translated operation by operation.

A `Language` says how to translate each operation: into a line of Triton in kernels/lower.py, into an expression of
SymPy in goal/lab/read.py. The rest is common to both and is here: which calls are methods, how arguments bind, how a
refusal is worded.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

_INSIDE = (torch.__name__, __name__)  # modules whose frames do not belong to the term's author


class CannotTrace(ValueError):
    """A term has a part that cannot be translated; the message names the term, the operation and the way out."""


class Language(NamedTuple):
    """A target language for operations."""

    table: Mapping[str, Callable[..., Any]]  # by names: "mul multiply"; "Tensor.where": a method unlike the function
    constant: Callable[[float], Any]  # translates a number in the term's function
    where: str  # "a kernel"
    error: type[CannotTrace]
    otherwise: str  # advice: the alternative to rewriting the term

    @property
    def known(self) -> str:
        """The names of the operations, for a message."""
        return ", ".join(names.split()[0] for names in self.table if "." not in names) + ", dtype"

    def find(self, name: str) -> Callable[..., Any] | None:
        """The translation of an operation of that name, or None."""
        return next((code for names, code in self.table.items() if name in names.split()), None)


class _Tracer(GraphAppendingTracer):
    def __init__(self, owner: str, language: Language) -> None:
        super().__init__(Graph())
        self.owner, self.language = owner, language

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        proxy.node.meta["line"] = _line()
        return proxy

    def to_bool(self, obj: Proxy) -> bool:
        raise self.language.error(
            f"{self.owner} branches on a value that is only known in {self.language.where}{_line()}; only `is None` "
            f"and booleans are known before. Write it with torch.where, {self.language.otherwise}"
        )


def _line() -> str:
    """The place of an operation in the author's code, as part of a sentence; empty if there is no source."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame = frame.f_back
    if frame is None:
        return ""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f" in `{text}` (line {frame.f_lineno})" if text else ""


def trace(owner: str, names: tuple[str, ...], function: Callable[[Mapping[str, Proxy]], Any], to: Language) -> Graph:
    """The graph of a function of named tensors and numbers; the graph's output is the function's result.

    Raises:
        CannotTrace: as `to.error`, if the function branches on a value or needs a property that only a real tensor has.
    """
    tracer = _Tracer(owner, to)
    given = {name: tracer.proxy(tracer.graph.placeholder(name)) for name in names}
    try:
        tracer.graph.output(tracer.create_arg(function(given)))
    except CannotTrace:
        raise
    except Exception as error:
        raise to.error(
            f"{owner} cannot be traced: {error}. Write it with tensors and known operations: {to.known}; {to.otherwise}"
        ) from error
    return tracer.graph


def translate(
    owner: str, graph: Graph, given: Mapping[str, Any], to: Language, keep: Callable[[Any, list[Any]], Any]
) -> tuple[Any, ...]:
    """The results of a graph, in a language.

    given: its arguments in that language. keep: makes a value from an operation's translation and its operands.

    Raises:
        CannotTrace: as `to.error`, naming an operation that the language does not have, and its line.
    """
    values: dict[Node, Any] = {}

    def operand(arg: Any) -> Any:
        if isinstance(arg, Node):
            return values[arg]
        if isinstance(arg, int | float):
            return to.constant(arg)
        if arg is None or isinstance(arg, torch.dtype):
            return arg
        raise TypeError(f"{arg!r} is neither a number nor computed from the term's arguments")

    *nodes, output = list[Any](graph.nodes)
    for node in nodes:
        values[node] = given[node.target] if node.op == "placeholder" else keep(*_applied(owner, node, operand, to))
    try:
        returned = output.args[0]
        if not isinstance(returned, tuple) or any(each is None for each in returned):
            raise TypeError(f"{returned!r} is no tuple of numbers and of what is computed from the term's arguments")
        return tuple(map(operand, returned))
    except TypeError as error:
        raise to.error(
            f"{owner} returns what {to.where} cannot have: {error}. Return tensors or numbers, {to.otherwise}"
        ) from error


def _applied(owner: str, node: Any, operand: Callable[[Any], Any], to: Language) -> tuple[Any, list[Any]]:
    """The translation of an operation applied to its operands, and the operands."""
    if node.target is getattr and node.args[1] == "dtype":  # a dtype read from a tensor stands for the tensor
        return operand(node.args[0]), []
    if node.op == "call_method":
        code = to.find(f"Tensor.{node.target}") or to.find(node.target)
    else:
        code = to.find(node.target.__name__)
    shown, line = _shown(node), node.meta.get("line", "")
    if code is None:
        raise to.error(
            f"{owner}: {shown} cannot be translated for {to.where}{line}; known operations: {to.known}. Write the term "
            f"with these, {to.otherwise}"
        )
    try:
        args, kwargs = list(map(operand, node.args)), {name: operand(arg) for name, arg in node.kwargs.items()}
        inspect.signature(code).bind(*args, **kwargs)
        return code(*args, **kwargs), [*args, *kwargs.values()]
    except TypeError as error:
        raise to.error(
            f"{owner}: {shown} cannot be translated here: {error}{line}. Rewrite it, {to.otherwise}"
        ) from error


def _shown(node: Any) -> str:
    """The name of an operation as its user knows it."""
    if node.op == "call_method" or node.target is getattr:
        return f"Tensor.{node.target if node.op == 'call_method' else node.args[1]}"
    return torch.overrides.resolve_name(node.target) or f"{node.target.__module__.lstrip('_')}.{node.target.__name__}"
