"""Every example runs: the docstrings of all modules, and all Python blocks of the README and of docs/."""

import doctest
import importlib
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import goal

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pytestmark = pytest.mark.usefixtures("registries", "one_thread")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples that write leave nothing behind."""
    monkeypatch.chdir(tmp_path)


# ── docstrings ──────────────────────────────────────────────────────────────────────────────────────────

NAMES = [
    "goal",
    *(found.name for found in pkgutil.walk_packages(goal.__path__, "goal.") if "kernels" not in found.name),
]


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0


def test_the_heart_has_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name, least in (
        ("goal.functional", 3),
        ("goal.recipes", 4),
        ("goal.terms.triplet", 1),
        ("goal.terms.pair", 1),
        ("goal.evaluation", 1),
    ):
        tests = [each for each in finder.find(importlib.import_module(name)) if each.examples]
        assert len(tests) >= least, name


# ── pages ───────────────────────────────────────────────────────────────────────────────────────────────


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line of the fence, language, code) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield line, found["language"].strip(), textwrap.dedent(found["body"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, language, code in blocks(page):
        if language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # lines as in the page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes_being_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(list(blocks(page))), "a fence is not closed"
    for line, language, code in blocks(page):
        where = f"{page.name}:{line}"
        assert language, f"{where}: say what it is: python, bash, text, …"
        assert language.lower() not in ("py", "python3", "pycon", "ipython", "python-repl"), where
        assert language == "python" or language.lower() != "python", where
        assert not re.match(r"\s*#\s*not run", code, re.I), where
        assert language == "python" or not re.match(r"\s*(import|from) (goal|torch)\b", code), where


def test_the_pages_that_docs_begin_with() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "quickstart.md", "mathematics.md", "architecture.md"} <= names
    for name in ("README.md", "quickstart.md"):
        page = next(page for page in PAGES if page.name == name)
        assert any(language == "python" for _, language, _ in blocks(page))


def test_blocks_are_found_and_their_lines_are_right(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n- b\n\n  ```python\n  y = 2\n  z = 1 / 0\n  ```\n")
    assert [(line, code) for line, _, code in blocks(page)] == [(3, "x = 1\n"), (8, "y = 2\nz = 1 / 0\n")]
    with pytest.raises(ZeroDivisionError) as raised:
        test_python_blocks_run_in_order(page)
    assert raised.traceback[-1].lineno + 1 == 10
