"""Who imports whom, what is public, and what a plain `import goal` pulls in."""

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import goal
import goal.data
import goal.evaluation
import goal.models
import goal.training

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "goal"
HEAVY = ("triton", "matplotlib", "rich", "optuna", "safetensors", "h5py", "pyarrow", "faiss")


def modules(folder: Path) -> dict[str, Path]:
    """Dotted names of the Python files below a folder at the root; what a link leads to is not listed twice."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


KERNELS = {f"goal.{name}": path for name, path in modules(ROOT / "kernels").items()}
MODULES = {name: path for name, path in modules(LIBRARY).items() if not name.startswith("goal.kernels")} | KERNELS


@functools.cache
def imports(path: Path) -> list[tuple[str, str | None, bool]]:
    """(module, name imported from it or None, whether at the top level), wherever in the file they stand."""
    tree = ast.parse(path.read_text())
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    found: list[tuple[str, str | None, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [(node.module or "", alias.name, node not in lazy) for alias in node.names]
    return found


def known(path: Path) -> set[str]:
    """The modules of the library that a file imports."""
    found = set()
    for module, name, _ in imports(path):
        whole = f"{module}.{name}"
        found.add(whole if whole in MODULES else module)
    return {module for module in found if module.split(".")[0] == "goal"}


def of(module: str) -> set[str]:
    """What goal.<module> knows of the library, without the package itself."""
    return {name.removeprefix("goal.") for name in known(MODULES[f"goal.{module}"])}


# ── who may import whom ─────────────────────────────────────────────────────────────────────────────────


def test_the_reading_of_imports_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("import goal.terms as t\nfrom goal import engine, T\ndef f():\n    import triton\n")
    assert known(path) == {"goal.terms", "goal.engine", "goal"}
    assert list(imports(path))[-1] == ("triton", None, False)


def test_models_know_nothing_of_training() -> None:
    for name, path in MODULES.items():
        if name.startswith("goal.models"):
            assert not any(each.startswith(("goal.training", "goal.cli")) for each in known(path)), name


def test_what_terms_rules_and_similarities_know() -> None:
    assert of("names") == of("validation") == set()
    for name in MODULES:
        if name.startswith("goal.terms"):
            assert all(each in ("names", "validation") or each.startswith("terms.") for each in of(name[5:])), name
    assert of("mining") == {"names", "validation"}
    assert of("similarity") == {"engine.types", "names"}
    assert of("engine.statistics") == {"mining"}
    assert of("engine.types") == {"engine.statistics", "mining", "terms.product"}
    assert of("engine.partials") == {"engine.statistics", "engine.types", "positives"}
    assert of("positives") == {"mining", "names", "validation"}


def test_the_engine_knows_nothing_of_what_stands_on_it() -> None:
    below = ("engine.", "terms", "kernels", "mining", "names", "positives", "similarity", "validation")
    for name in MODULES:
        if name.startswith("goal.engine."):
            assert all(each.startswith(below) for each in of(name[5:])), name


def test_caching_knows_no_objective() -> None:
    """It calls what it is given: anything with a scalar."""
    assert of("caching") == {"validation"}


def test_banks_and_made_rows_go_through_objectives() -> None:
    below = {
        "candidates.two_way",
        "distributed.exchange",
        "distributed.rows",
        "engine.call",
        "functional",
        "names",
        "objective",
        "stats",
        "validation",
    }
    for name in ("augment", "bank", "two_way"):
        assert of(f"candidates.{name}") <= below


def test_offline_mining_stands_beside_evaluation() -> None:
    assert of("offline") == {"data.files", "data.terminal", "evaluation", "similarity", "validation"}


def test_the_eager_path_and_the_kernels_do_not_know_each_other() -> None:
    assert not any("kernels" in name for name in of("engine.eager"))
    for name, path in KERNELS.items():
        assert "goal.engine.eager" not in known(path), name


def test_there_are_kernels() -> None:
    assert {"goal.kernels.scan", "goal.kernels.emit", "goal.kernels.dense", "goal.kernels.launch"} <= set(KERNELS)


def test_only_the_backend_knows_both() -> None:
    both = {
        name
        for name, path in MODULES.items()
        if "goal.engine.eager" in known(path) and any(each.startswith("goal.kernels") for each in known(path))
    }
    assert both == {"goal.engine.backend"}


def test_no_field_of_a_compiled_tuple_stands_in_a_list_of_a_kernel() -> None:
    """Triton before 3.9, which a GPU's PyTorch brings, does not compile `tl.zeros([CUT.height])`."""
    lists = (node for path in KERNELS.values() for node in ast.walk(ast.parse(path.read_text())))
    parts = [part for node in lists if isinstance(node, ast.List) for part in node.elts]
    assert [ast.unparse(part) for part in parts if re.match(r"[A-Z]+\.", ast.unparse(part))] == []


def test_kernels_are_imported_where_they_are_used() -> None:
    for name, path in MODULES.items():
        if name not in KERNELS:
            assert not any(at_top and module.startswith("goal.kernels") for module, _, at_top in imports(path)), name


def test_the_library_has_no_cycles() -> None:
    below = {name: known(path) - {"goal", name} for name, path in MODULES.items() if name != "goal"}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for each in below.get(name, set()):
                walk(each, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in below:
        walk(name, ())


def test_only_the_public_face_builds_on_the_engine() -> None:
    face = {"goal.explain", "goal.functional", "goal.objective", "goal.recipes", "goal.stats"}
    for name, path in MODULES.items():
        if "goal.engine.path" in known(path):
            assert name in face or name.startswith(("goal.engine.", "goal.distributed.")), name


def test_only_one_file_of_the_engine_speaks_to_other_ranks() -> None:
    for name, path in MODULES.items():
        if name == "goal.training.loop":  # tells all ranks what the first has found
            continue
        taken = {each for module, each, _ in imports(path) if module.startswith("torch.distributed")}
        assert name == "goal.distributed.exchange" or taken <= {"ProcessGroup"}, name
    assert of("distributed.exchange") == {"names", "validation"}
    for name in MODULES:
        if name.startswith("goal.distributed"):
            assert not {"functional", "objective", "stats"} & of(name[5:]), name


@pytest.mark.parametrize("heavy", HEAVY)
def test_heavy_packages_are_imported_where_they_are_used(heavy: str) -> None:
    for name, path in {**MODULES, **modules(ROOT / "benchmarks")}.items():
        if name in KERNELS or "TYPE_CHECKING" in path.read_text():
            continue
        for module, _, at_top in imports(path):
            assert not (at_top and module.split(".")[0] == heavy), name


# ── public names only ───────────────────────────────────────────────────────────────────────────────────

PACKAGES = (
    "goal.candidates",
    "goal.data",
    "goal.distributed",
    "goal.lab",
    "goal.models",
    "goal.names",
    "goal.plotting",
    "goal.spec",
    "goal.training",
    "goal.evaluation",
    "goal.validation",
)  # public beside `goal` itself
OUTSIDE = {
    name: path
    for name, path in {**MODULES, **modules(ROOT / "benchmarks")}.items()
    if name.startswith(("goal.training", "goal.cli", "goal.integrations", "benchmarks"))
}


def private_uses(path: Path) -> Iterator[str]:
    """What a file takes from the library that is not public."""
    public = {*goal.__all__, *(name.removeprefix("goal.") for name in PACKAGES), "__version__"}
    for module, name, _ in imports(path):
        if module.split(".")[0] != "goal":
            continue
        inside = module == "goal" or any(module == each or module.startswith(f"{each}.") for each in PACKAGES)
        if not inside or (module == "goal" and name is not None and name not in public):
            yield f"{module}.{name}"
        if any(part.startswith("_") for part in (*module.split("."), name or "")):
            yield f"{module}.{name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        chain, root = [node.attr], node.value
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id == "goal":
            hidden = any(part.startswith("_") and not part.startswith("__") for part in chain)
            if chain[-1] not in public or hidden:
                yield f"goal.{'.'.join(reversed(chain))}"


@pytest.mark.parametrize("name", OUTSIDE)
def test_public_names_only(name: str) -> None:
    assert sorted(set(private_uses(OUTSIDE[name]))) == []


def test_private_uses_are_found(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import goal\nfrom goal import engine, Objective\nfrom goal.data import _x\nfrom goal.terms import spell\n"
        "goal.apply(goal.T._definitions, goal.mining.hardest())\ngoal.engine.TILE\n"
    )
    expected = {"goal.engine", "goal.data._x", "goal.terms.spell", "goal.T._definitions", "goal.engine.TILE"}
    assert set(private_uses(path)) == expected


def test_something_is_outside() -> None:
    assert {"goal.cli", "goal.training.loop", "benchmarks.cpu"} <= set(OUTSIDE)


# ── importing ───────────────────────────────────────────────────────────────────────────────────────────


LATER = ("data", "diagnosis", "models", "offline", "lab")  # the last loads others
IMPORTED = f"""
import json, sys, torch, numpy
before = set(sys.modules)
import goal
new = set(sys.modules) - before
seen = {{"heavy": [name for name in {HEAVY} if name in new]}}
for package in {LATER}:
    name = f"goal.{{package}}"
    seen[package] = [name in sys.modules]
    getattr(goal, package)
    seen[package] += [name in sys.modules]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a fresh interpreter has imported, step by step."""
    found = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stderr == ""
    seen: dict[str, Any] = json.loads(found.stdout)
    return seen


def test_import_goal_is_light(imported: dict[str, Any]) -> None:
    assert imported["heavy"] == []


@pytest.mark.parametrize("package", LATER)
def test_what_comes_when_it_is_asked_for(package: str, imported: dict[str, Any]) -> None:
    assert imported[package] == [False, True]


def test_no_package_of_ours_is_called_kernels() -> None:
    """transformers probes for an unrelated package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


# ── the public surface ──────────────────────────────────────────────────────────────────────────────────


def test_all_is_what_dir_says() -> None:
    shown = {
        name
        for name in dir(goal)
        if not name.startswith("_") and (name in goal.__all__ or not isinstance(getattr(goal, name), ModuleType))
    }
    assert shown == set(goal.__all__)
    assert goal.__all__ == sorted(goal.__all__)
    assert all(hasattr(goal, name) for name in goal.__all__)
    assert goal.__version__


PUBLIC = {"apply", "apply_similarity", "gradients", "explain", "Objective", "recipe", "recipes", "pairs"}
PUBLIC |= {"T", "P", "mining", "triplet_weight", "pair_weight", "Stats", "InfoNCE", "SigLIP"}
PUBLIC |= {"cached_step", "Cache", "Bank", "Banked", "offline"}
SELECTIONS = ("hardest", "semi_hard", "soft", "all_negatives", "selective")


def test_what_the_project_promises_is_public() -> None:
    assert set(goal.__all__) >= PUBLIC
    assert all(name in vars(goal.mining) for name in SELECTIONS)
    expected = [
        "T",
        "P",
        "mining",
        "positives",
        "reduction",
        "scale",
        "directions",
        "ids",
        "y_ids",
        "weight",
        "similarity",
    ]
    expected += ["impl", "precision", "check_finite"]
    over_ranks = ["group", "averaged", "exchange"]
    assert list(inspect.signature(goal.apply).parameters) == ["x", "y", *expected, *over_ranks]
    assert list(inspect.signature(goal.gradients).parameters) == ["x", "y", *expected, *over_ranks]
    given = [name for name in expected if name not in ("similarity", "precision")]
    assert list(inspect.signature(goal.apply_similarity).parameters) == ["S", *given]


def documented(owner: ModuleType, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The functions and classes among them; a NamedTuple documents itself by its fields, a constant needs nothing."""
    for name in names:
        value = getattr(owner, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and not hasattr(value, "_fields"):
            yield f"{owner.__name__}.{name}", value


SYMBOLS = {
    **dict(documented(goal, goal.__all__)),
    **dict(documented(goal.mining, SELECTIONS)),
    **dict(documented(goal.offline, ["mine", "search"])),
    **dict(documented(goal.data, [name for name in vars(goal.data) if not name.startswith("_")])),
    **dict(documented(goal.models, goal.models.__all__)),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_every_public_symbol_is_documented_by_example(name: str) -> None:
    text = inspect.getdoc(SYMBOLS[name])
    assert text
    assert text.splitlines()[0].rstrip().endswith((".", ":", ";")), "it begins with a sentence"
    assert ">>>" in text


def test_named_tuples_say_the_shapes_of_their_fields() -> None:
    source = inspect.getsource(goal.Stats)
    for name in goal.Stats._fields:
        line = next(line for line in source.splitlines() if line.strip().startswith(f"{name}: "))
        assert "#" in line, name
