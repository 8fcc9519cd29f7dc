"""Kinds of tensors, arrays, columns and numbers, in every call that takes them: right, or refused by name."""

import array
import collections
import contextlib
import copy
import fractions
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from goal import validation
from goal.candidates import Augmented, interpolate, mixup

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = goal.recipes()


def unit(n: int = 8, d: int = 6, seed: int = 0) -> Tensor:
    """Embeddings that every recipe takes."""
    return normalize(torch.randn(n, d, generator=torch.Generator("cpu").manual_seed(seed)), dim=1).abs()


X, Y, *PAST = (unit(seed=seed) for seed in range(4))
IDS = [1, 1, 2, 3, 4, 5, 6, 7]


def banked() -> goal.Banked:
    bank = goal.Bank(8, 6)
    bank.push(*PAST, list(range(10, 18)))
    return goal.Banked(goal.Objective(), bank)


# what takes (x, y), beside the recipes
CALLS: dict[str, Callable[..., Any]] = {
    "apply": goal.apply,
    "order": lambda x, y, **of: goal.apply(x, y, similarity="order", **of),
    "gradients": lambda x, y, **of: goal.gradients(x, y, **of)[:2],
    "augmented": lambda x, y, **of: Augmented(goal.Objective())(x, y, **of).isfinite(),  # it draws
    "banked": lambda x, y, ids=IDS, **of: banked()(x, y, ids, **of),
}
OBJECTIVES = CALLS | {name: lambda x, y, name=name, **of: goal.recipe(name)(x, y, **of) for name in RECIPES}


def value(found: Any) -> Tensor:
    return torch.cat([one.detach().flatten() for one in (found if isinstance(found, tuple) else (found,))])


# ── embeddings ──────────────────────────────────────────────────────────────────────────────────────────


class Named(Tensor):
    """A subclass without behaviour, as image libraries have."""


TENSORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "coo": (Tensor.to_sparse, "dense (strided) tensor, got layout torch.sparse_coo: call {name}.to_dense()"),
    "csr": (Tensor.to_sparse_csr, "dense (strided) tensor, got layout torch.sparse_csr: call {name}.to_dense()"),
    "mkldnn": (Tensor.to_mkldnn, "dense (strided) tensor, got layout torch._mkldnn: call {name}.to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "got a nested tensor: call {name}.to_padded_tensor"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), "got a masked tensor: call {name}.to_tensor"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "call {name}.dequantize()"),
    "meta": (lambda x: x.to("meta"), "{name} is on the meta device, which holds no values"),
    "complex": (
        Tensor.cfloat,
        "{name} must have one of the dtypes float32, float64, bfloat16, float16, got torch.complex64",
    ),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "{name} must have one of the dtypes float32, "),
    "array": (
        Tensor.numpy,
        "{name} must be a torch.Tensor of shape {shape}, got ndarray: torch.as_tensor({name}) makes one",
    ),
    "masked array": (lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 0), "{name} must be a torch.Tensor"),
    "list": (
        Tensor.tolist,
        "{name} must be a torch.Tensor of shape {shape}, got list: torch.as_tensor({name}) makes one",
    ),
    "no columns": (lambda x: x[:, :0], "{name} must have at least one row and one column, got shape"),
}
PLACES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    **{f"x of {name}": (lambda x, call=call: call(x, Y), "x", "(N, D)") for name, call in OBJECTIVES.items()},
    **{f"y of {name}": (lambda y, call=call: call(X, y), "y", "(M, D)") for name, call in OBJECTIVES.items()},
    "x of push": (lambda x: goal.Bank(4, 6).push(x, Y, IDS), "x", "(N, D)"),
    "S": (goal.apply_similarity, "S", "(N, M)"),
    "pairs": (lambda x: goal.pairs(x, IDS), "embeddings", "(B, D)"),
    "interpolate": (lambda x: interpolate(x, IDS), "x", "(B, D)"),
    "mixup": (lambda x: mixup(x, IDS), "x", "(B, D)"),
}


@pytest.mark.filterwarnings("ignore")  # that nested, masked and quantised tensors are prototypes
@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_no_dense_floating_point_matrix_is_refused_by_name(kind: str) -> None:
    make, said = TENSORS[kind]
    for place, (call, name, shape) in PLACES.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            call(make(X))
        assert said.format(name=name, shape=shape) in str(raised.value), place
        assert str(raised.value).startswith(f"{name} "), place
    if kind != "meta":
        with pytest.raises((TypeError, ValueError), match=r"^y "):
            goal.explain(X, make(Y))


def test_a_plan_needs_no_values() -> None:
    assert goal.explain(X.to("meta"), Y.to("meta")).flops == goal.explain(X, Y).flops


@pytest.mark.parametrize("name", OBJECTIVES)
def test_subclasses_and_views_are_tensors_like_any_other(name: str) -> None:
    call = OBJECTIVES[name]
    expected = value(call(X, Y, ids=IDS))
    wide = torch.empty(8, 12)[:, ::2].copy_(X)
    for x in (X.as_subclass(Named), nn.Parameter(X), wide, X.T.contiguous().T):
        torch.testing.assert_close(value(call(x, Y, ids=IDS)), expected)
    x = X.clone().requires_grad_()
    if name != "gradients":
        found = call(x.as_subclass(Named), Y, ids=IDS)
        assert type(found) is Tensor


# ── identities ──────────────────────────────────────────────────────────────────────────────────────────


class Column:
    """A column of a table as pandas has it, whose index is not 0, 1, 2, …: only NumPy can read it by place."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: int) -> Any:
        return self.values[len(self.values) - 1 - key]


BIG = 2**62  # float64 does not tell such numbers apart
INTEGERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": collections.deque,
    "array.array": lambda ids: array.array("q", ids),
    "objects": lambda ids: np.array(ids, object),
    "column": lambda ids: Column(np.array(ids)),
    "column of objects": lambda ids: Column(np.array(ids, object)),
    "scalars": lambda ids: [np.uint64(ids[0]), torch.tensor(ids[1], device="cpu"), np.array(ids[2]), *ids[3:]],
    "reversed": lambda ids: np.array(ids[::-1])[::-1],
    **{f"NumPy {code}": lambda ids, code=code: np.array(ids, code) for code in ("i8", ">i8", "u8", ">u8")},
    **{f"{dtype}": lambda ids, dtype=dtype: torch.tensor(ids, dtype=dtype) for dtype in (torch.int64, torch.uint64)},
}
NARROW = {
    **{f"NumPy {code}": lambda ids, code=code: np.array(ids, code) for code in ("u1", "i1", ">u2", ">i4", "<u4")},
    **{
        f"{dtype}": lambda ids, dtype=dtype: torch.tensor(ids, dtype=dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)
    },
}
TAKE_IDS: dict[str, Callable[[Any], Any]] = {
    **{name: lambda ids, call=call: call(X, Y, ids=ids) for name, call in OBJECTIVES.items()},
    "y_ids": lambda ids: goal.gradients(X, Y, ids=IDS, y_ids=ids, positives="hardest", check_finite=False)[:2],
    "S": lambda ids: goal.apply_similarity(X @ Y.T, ids=ids),
    "pairs": lambda ids: goal.pairs(X, ids),
    "interpolate": lambda ids: tuple(interpolate(X, ids, generator=torch.Generator("cpu").manual_seed(0))),
    "mixup": lambda ids: tuple(mixup(X, ids, generator=torch.Generator("cpu").manual_seed(0))),
}


@pytest.mark.parametrize("kind", [*INTEGERS, *NARROW])
def test_integers_of_any_kind_are_identities(kind: str) -> None:
    make, base = (INTEGERS[kind], BIG) if kind in INTEGERS else (NARROW[kind], 0)
    ids = [base + one for one in IDS]
    for name, call in TAKE_IDS.items():
        expected = value(call(torch.tensor(ids)))
        assert torch.equal(value(call(make(ids))), expected), name
    bank = goal.Bank(8, 6)
    bank.push(X, Y, make(ids), make(ids[::-1]))
    assert bank.x.ids.tolist() == ids
    assert bank.y.ids.tolist() == ids[::-1]


def test_a_real_column() -> None:
    pandas = pytest.importorskip("pandas")
    for dtype in ("int64", "uint64", "Int64", "object"):
        column = pandas.Series([BIG + one for one in IDS], index=range(8, 0, -1), dtype=dtype)
        found = validation.identity("ids", column, 8, "x", torch.device("cpu"))
        assert found.tolist() == [BIG + one for one in IDS]
    for column in (pandas.Series([1.0, None] * 4), pandas.Series([1, None] * 4, dtype="Int64")):
        with pytest.raises(TypeError, match="ids must be integers"):
            validation.identity("ids", column, 8, "x", torch.device("cpu"))


NO_IDENTITY: dict[str, tuple[Any, type[Exception], str]] = {
    "floats": ([1.0] * 8, TypeError, "got 1.0 in row 0: a column with a missing value becomes float"),
    "one float": ([1, 2.0, 3, 4, 5, 6, 7, 8], TypeError, "got 2.0 in row 1"),
    "one bool": ([2, True, 3, 4, 5, 6, 7, 8], TypeError, "got True in row 1"),
    "one NumPy bool": ([2, np.True_, 3, 4, 5, 6, 7, 8], TypeError, "in row 1"),
    "None": ([1, None, 3, 4, 5, 6, 7, 8], TypeError, "got None in row 1: a column with a missing value"),
    "a missing value": (Column(np.array([1, np.nan] * 4)), TypeError, "got dtype float64: a column with a missing"),
    "bools": (np.ones(8, bool), TypeError, "got dtype bool"),
    "strings": (["a"] * 8, TypeError, "got 'a' in row 0: numpy.unique(..., return_inverse=True)"),
    "array of strings": (np.array(["a"] * 8), TypeError, "got dtype <U1: numpy.unique(..., return_inverse=True)"),
    "objects": (np.array(["a"] * 8, object), TypeError, "numpy.unique(..., return_inverse=True)"),
    "bytes": (b"abcdefgh", TypeError, "got bytes"),
    "a string": ("abcdefgh", TypeError, "got str"),
    "a set": (set(range(8)), TypeError, "got set"),
    "fractions": ([fractions.Fraction(1)] * 8, TypeError, "got Fraction(1, 1) in row 0"),
    "dates": (np.arange(8).astype("M8[s]"), TypeError, "got dtype datetime64[s]"),
    "2⁶³ beside −1": ([2**63, -1, 3, 4, 5, 6, 7, 8], ValueError, "got 9223372036854775808 in row 0"),
    "2⁶³": (
        np.array([1, 2**63] * 4, np.uint64),
        ValueError,
        "int64, −2⁶³ to 2⁶³ − 1, got 9223372036854775808 in row 1",
    ),
    ">2⁶³": (np.array([1, 2**63] * 4, ">u8"), ValueError, "got 9223372036854775808 in row 1"),
    "tensor": (torch.tensor([1, 2**64 - 1] * 4, dtype=torch.uint64), ValueError, "got 18446744073709551615 in row 1"),
    "below": ([-(2**63) - 1] * 8, ValueError, "got -9223372036854775809 in row 0"),
    "masked": (np.ma.masked_array(IDS, [0, 1] * 4), ValueError, "masked"),
    "sparse": (torch.tensor(IDS).to_sparse(), TypeError, "to_dense()"),
    "meta": (torch.tensor(IDS, device="meta"), ValueError, "meta device"),
    "a matrix": (np.zeros((8, 1), int), ValueError, "shape (8,)"),
    "a number": (np.int64(8), ValueError, "shape (8,)"),
}


@pytest.mark.parametrize("kind", NO_IDENTITY)
def test_what_is_no_identity_is_refused_by_name_and_row(kind: str) -> None:
    bad, error, said = NO_IDENTITY[kind]
    for name, call in TAKE_IDS.items():
        with pytest.raises(error) as raised:
            call(bad)
        argument = {"y_ids": "y_ids", "pairs": "labels"}.get(name, "ids")
        assert str(raised.value).startswith(f"{argument} "), name
        assert said in str(raised.value), name
    with pytest.raises(error, match=r"^y_ids "):
        goal.Bank(4, 6).push(X, Y, IDS, bad)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────

WEIGHT = [1.0, 0.1, 0.3, 0.0, 2.0, 0.7, 1e-3, 1.0]


@pytest.mark.parametrize(
    "weight",
    [
        tuple(WEIGHT),
        Column(np.array(WEIGHT)),
        np.array(WEIGHT, ">f8"),
        np.array(WEIGHT, object),
        np.array(WEIGHT, np.longdouble),
        [np.float64(one) for one in WEIGHT],
        np.array(WEIGHT[::-1])[::-1],
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_numbers_of_any_kind_are_weights(weight: Any) -> None:
    x, y = X.double(), Y.double()
    expected = goal.gradients(x, y, weight=torch.tensor(WEIGHT, dtype=torch.float64))
    for given in (weight, WEIGHT):
        assert torch.equal(goal.gradients(x, y, weight=given)[0], expected[0])


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (["1"] * 8, "must be numbers"),
        (np.array(["1"] * 8), "got dtype <U1"),
        ([True] * 8, "must be real numbers"),
        (np.ones(8, bool), "got dtype bool"),
        (np.ones(8, complex), "complex128"),
        (torch.ones(8).to_sparse(), "weight must be a dense (strided) tensor, got layout torch.sparse_coo"),
        (torch.ones(8).to_mkldnn(), "weight must be a dense (strided) tensor, got layout torch._mkldnn"),
        (torch.ones(8, device="meta"), "weight is on the meta device"),
        (np.ma.masked_array(WEIGHT, [0, 1] * 4), "masked"),
        ([1, -1, 1, 1, 1, 1, 1, 1], "got -1.0 at position 1"),
        ([1, float("nan"), 1, 1, 1, 1, 1, 1], "got nan at position 1"),
    ],
    ids=str,
)
def test_what_is_no_weight_is_refused(weight: Any, said: str) -> None:
    for call in CALLS.values():
        with pytest.raises((TypeError, ValueError)) as raised:
            call(X, Y, weight=weight)
        assert str(raised.value).startswith("weight ")
        assert said in str(raised.value)


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS: list[Callable[[float], Any]] = [
    np.float16,
    np.float32,
    np.float64,
    np.longdouble,
    np.array,
    lambda one: np.array([one]),
    lambda one: torch.tensor(one, device="cpu"),
    fractions.Fraction,
]
PARAMETERS: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
    (lambda one: goal.T.con(margin=one), lambda term: term.params["margin"]),
    (lambda one: goal.T.cir(tau=one), lambda term: term.params["tau"]),
    (lambda one: goal.P.sig_ms(beta=one), lambda term: term.params["beta"]),
    (lambda one: goal.mining.semi_hard(margin=one), lambda mining: mining.margin),
    (lambda one: goal.mining.selective(eps=one), lambda mining: mining.eps),
    (lambda one: goal.recipe("infonce", tau=one), lambda objective: objective.settings.mining.softmax.tau),
    (lambda one: goal.Objective(scale=one), lambda objective: objective.settings.scale),
    (lambda one: goal.mining.soft(alpha=one), lambda rule: rule.softmax.alpha),
    (lambda one: goal.recipe("siglip", bias=one), lambda objective: objective.bias.item()),
    (lambda one: goal.diagnose(goal.Objective(), eps=one), lambda diagnosis: diagnosis._eps),
]


@pytest.mark.parametrize(("make", "read"), PARAMETERS)
def test_numbers_of_any_kind_are_parameters(make: Callable[[Any], Any], read: Callable[[Any], Any]) -> None:
    for kind in NUMBERS:
        found = read(make(kind(0.25)))
        assert found == 0.25
        assert type(found) is float
    assert read(make(np.int32(3))) == 3
    for bad in (np.float32("nan"), np.float64("inf"), np.array(-np.inf), 10**400, np.longdouble(10) ** 400):
        with pytest.raises(ValueError, match=r"finite|range"):
            make(bad)
    for wrong in (np.True_, np.array([1.0, 2.0]), np.array(1j), np.str_("1"), "1", []):
        with pytest.raises(TypeError, match="must be a number"):
            make(wrong)


SETTINGS: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("size", lambda one: goal.Bank(one, 4), lambda bank: len(bank.x.rows)),
    ("dim", lambda one: goal.Bank(4, one), lambda bank: bank.x.rows.shape[1]),
    ("n", lambda one: Augmented(goal.Objective(), n=one), lambda objective: objective.n),
    ("n", lambda one: len(interpolate(X, IDS, n=one).rows), int),
    ("n", lambda one: len(mixup(X, IDS, n=one).rows) // 8, int),
    ("ranks", lambda one: goal.explain(X, Y, ranks=one), lambda plan: plan.ranks),
    ("start", lambda one: goal.diagnose(goal.Objective(), start=one), lambda diagnosis: diagnosis._start),
    ("chunk", goal.Cache, lambda cache: cache.chunk),
]


@pytest.mark.parametrize(("name", "make", "read"), SETTINGS)
def test_integers_of_any_kind_are_settings(name: str, make: Callable[[Any], Any], read: Callable[[Any], Any]) -> None:
    for kind in (np.int8, np.uint64, np.array, torch.tensor):
        found = read(make(kind(2)))
        assert found == 2
        assert type(found) is int
    for wrong in (np.float64(2), np.True_, np.array(2.0), np.array([2]), torch.tensor(True), "2", None):
        if name == "ranks" and wrong is None:  # which is the default
            continue
        with pytest.raises(TypeError, match=f"^{name} must be a whole number"):
            make(wrong)
    for bad in (np.int64(-1), 2**63, 10**30):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number"):
            make(bad)


def test_bools_of_numpy_are_bools(registries: None) -> None:
    assert goal.mining.all_negatives(average=np.False_) == goal.mining.all_negatives(average=False)
    assert goal.P.sig_ms(self_term=np.True_) == goal.P.sig_ms(self_term=True)
    assert goal.Objective(averaged=np.False_).ranks is None
    with pytest.raises(ValueError, match="needs group="):
        goal.apply(X, Y, averaged=np.True_)
    for off in (False, np.False_):
        assert goal.apply(torch.full_like(X, torch.nan), Y, check_finite=off, mining="all").isnan()

    @goal.triplet_weight("switched")
    def switched(s_pos: Tensor, s_neg: Tensor, *, on: bool = np.True_) -> float:  # type: ignore[assignment]
        return 1.0 if on else 0.5

    assert goal.T.switched(on=np.False_).params == {"on": False}


# ── recipes ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_every_recipe_names_the_bad_row(recipe: str, bad: float) -> None:
    for side in range(2):
        given = [X.clone(), Y.clone()]
        given[side][3, 2] = given[side][5, 1] = bad
        with pytest.raises(ValueError, match=rf"^{'xy'[side]} has a .* \({bad}\) in row 3 \(2 such rows of 8"):
            goal.recipe(recipe)(*given, IDS)
        with pytest.raises(ValueError, match="in row 3"):
            goal.recipe(recipe, check_finite=True)(*given, IDS)
        given[side].requires_grad_()
        goal.recipe(recipe, check_finite=False)(*given, IDS).backward()
        if bad is torch.nan:
            assert not given[side].grad.isfinite().all()


def casts(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, AbstractContextManager[Any]]]:
    """Embeddings in 16 bits, on both sides or one, or with autocast around the loss of float32 ones."""
    for x, y in ((X, Y), (X, Y.to(dtype)), (X.to(dtype), Y), (X.to(dtype), Y.to(dtype)), (X.to(dtype), Y.double())):
        yield x, y, contextlib.nullcontext()
        yield x, y, torch.autocast("cpu", dtype)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_recipe_computes_in_float32_or_float64(recipe: str, dtype: torch.dtype) -> None:
    for x, y, around in casts(dtype):
        computed = torch.float64 if y.dtype == torch.float64 else torch.float32
        results = []
        for a, b in ((x, y), (x.to(computed), y.to(computed))):
            a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
            with around if (a.dtype, b.dtype) == (x.dtype, y.dtype) else contextlib.nullcontext():
                loss = goal.recipe(recipe)(a, b, ids=IDS)
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad))
        (loss, gx, gy), expected = results
        assert (loss.dtype, gx.dtype, gy.dtype, loss.dim()) == (computed, x.dtype, y.dtype, 0)
        for found, true in zip((loss, gx, gy), expected, strict=True):
            assert torch.equal(found, true.to(found.dtype))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_large_half_precision_batch_is_finite(recipe: str) -> None:
    x, y = unit(600, 16), unit(600, 16, 1)
    arguments = {"bias": 0.0} if recipe == "siglip" else {}  # 600 · log 2 on each row: beyond float16 in sum
    with torch.no_grad():
        objective = goal.recipe(recipe, **arguments)
        ids = torch.arange(600)
        assert objective(x.half(), y.half(), ids).item() == pytest.approx(objective(x, y, ids).item(), rel=2e-3)


# ── what a module keeps, and where ──────────────────────────────────────────────────────────────────────


def test_no_parameter_is_a_scalar() -> None:
    """Wrappers that shard parameters refuse those."""
    for name in RECIPES:
        for key, parameter in goal.recipe(name).named_parameters():
            assert parameter.dim() >= 1, (name, key)
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_scalars_of_an_earlier_version_load(assign: bool) -> None:
    old = {"0.log_tau": torch.tensor(1.5), "0.bias": torch.tensor(-3.0)}
    model = nn.Sequential(goal.recipe("siglip"))
    model.load_state_dict(copy.copy(old), assign=assign)
    assert {key: one.tolist() for key, one in model.state_dict().items()} == {"0.log_tau": [1.5], "0.bias": [-3.0]}
    assert all(one.dim() == 0 for one in old.values())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**old, "0.bias": torch.zeros(2)})


def test_models_that_hold_objectives_are_sharded_and_wrapped() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    from goal.distributed import joined
    from goal.training import Curriculum, Scheduled, linear, varying

    class Model(nn.Module):
        def __init__(self, objective: nn.Module) -> None:
            super().__init__()
            self.x, self.y, self.objective = nn.Linear(6, 4), nn.Linear(6, 4), objective

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.objective(self.x(x), self.y(y), IDS)

    scheduled = Scheduled(T=varying(goal.T.cir, tau=linear(1.0, 2.0, steps=5)))
    bank = goal.Bank(8, 4)
    bank.push(X[:, :4], Y[:, :4], IDS)
    objectives = [goal.recipe("siglip"), scheduled, goal.Banked(goal.Objective(), bank)]
    store = os.path.join(tempfile.mkdtemp(), "store")
    with joined(init_method=f"file://{store}", rank=0, world_size=1):
        with pytest.raises(TypeError, match=r"^x must be a dense .* got a DTensor: call x\.full_tensor\(\)"):
            goal.apply(distribute_tensor(X, init_device_mesh("cpu", (1,))), Y)
        for objective in (*objectives, Curriculum(objectives, until=[3, 3])):
            for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
                model = Model(copy.deepcopy(objective))
                expected = model(X, Y).item()
                mesh = {"mesh": init_device_mesh("cpu", (1,))} if wrap is fully_shard else {}
                wrapped: Any = wrap(model, **mesh)
                loss = wrapped(X, Y)
                loss.backward()
                assert loss.item() == pytest.approx(expected)
                set_model_state_dict(wrapped, get_model_state_dict(wrapped))
                assert wrapped(X, Y).item() == pytest.approx(expected)


# ── another default ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def default(what: Any) -> Iterator[None]:
    """Another default dtype or device, or a device as a context."""
    if isinstance(what, torch.dtype):
        torch.set_default_dtype(what)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    elif isinstance(what, torch.device):
        with what:
            yield
    else:
        torch.set_default_device(what)
        try:
            yield
        finally:
            torch.set_default_device(None)


def works() -> dict[str, Any]:
    """What this library makes of CPU tensors, without a generator of the caller's."""
    found: dict[str, Any] = {name: value(call(X, Y, ids=IDS)) for name, call in OBJECTIVES.items()}
    found |= {name: value(call(X, Y, weight=WEIGHT)) for name, call in CALLS.items()}
    found |= {name: value(call(IDS)) for name, call in TAKE_IDS.items()}
    for mining in ("hardest", "semi-hard", "all", "selective"):
        objective = goal.Objective("nca", "lin-ms", mining=mining)
        found[mining] = value(objective(X, Y, IDS))
        found[f"{mining}'s stats"] = str(objective.stats)
    objective = banked()
    other = goal.Bank(8, 6)
    other.load_state_dict(objective.bank.state_dict())
    found["bank"], found["bank's ids"] = other.x.held.rows, other.y.held.ids
    objective = goal.Objective()
    with goal.diagnose(objective) as diagnosis:
        objective(X.clone().requires_grad_(), Y).backward()
        found["diagnosis"] = str(diagnosis.step())
        diagnosis.draw()
    name = f"half-{len(goal.T)}"
    goal.triplet_weight(name)(lambda s_pos, s_neg: 0.3)
    found["term"] = value(goal.apply(X, Y, T=name, mining="all"))
    found["explain"] = str(goal.explain(X, Y))
    return found


@pytest.mark.parametrize("what", ["meta", torch.device("meta"), torch.float64, torch.bfloat16], ids=repr)
def test_another_default_changes_nothing(what: Any, registries: None) -> None:
    torch.manual_seed(0)
    expected = works()
    torch.manual_seed(0)
    with default(what):
        found = works()
    for name, true in expected.items():
        if isinstance(true, Tensor):
            assert found[name].dtype == true.dtype, name
            assert torch.equal(found[name], true), name
        else:
            assert found[name] == true, name
