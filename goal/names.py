"""Names of terms, rules and settings: a canonical spelling, and a common error for unknown names."""

import difflib
from collections.abc import Sequence


def spell(name: str) -> str:
    """The registered spelling of a name: hyphens, whatever was typed."""
    return name.replace("_", "-")


def unknown(argument: str, came: object, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: what came, the nearest known name, and all of them."""
    return ValueError(f"{argument}={came!r} is not known.{nearest(came, known)} Known: {', '.join(known)}.")


def nearest(came: object, known: Sequence[str]) -> str:
    """The question whether a known name was meant; nothing where none is near."""
    near = difflib.get_close_matches(spell(str(came)), known, n=1) or difflib.get_close_matches(str(came), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
