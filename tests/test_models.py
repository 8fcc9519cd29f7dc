"""Models: each formula against another computation of it, padding, randomness, dtypes, errors, and that they learn."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, relu
from torch.utils._python_dispatch import TorchDispatchMode

import goal
from goal.evaluation import evaluate
from goal.models import (
    GPO,
    SCAN,
    SETTINGS,
    AudioVisual,
    CrossAttention,
    GRUText,
    Joint,
    Projection,
    RegionImage,
    TokenText,
    Vocabulary,
    WordStates,
    cross_attention,
    hard_negatives,
    matching_pairs,
    rvse_pp,
    vse_infinity,
    vse_pp,
)
from goal.models.sets import drawn, thinned
from goal.models.text import END, MASK, PAD, START, UNKNOWN

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, DIM = 40, 12
LENGTHS = torch.tensor([3, 5, 1, 4])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(lengths: Sequence[int], width: int, size: int, filling: float) -> Tensor:
    """(N, size, width): set n is the same whatever `size` is; `filling` where padded."""
    sets = [torch.randn(length, width, generator=seeded(n)) for n, length in enumerate(lengths)]
    padded = torch.full((len(sets), size, width), filling)
    for row, real in zip(padded, sets, strict=True):
        row[: len(real)] = real
    return padded


def sentences(lengths: Sequence[int], size: int, filling: int) -> Tensor:
    """(B, size) tokens: <start> words <end>, `filling` where padded."""
    tokens = torch.full((len(lengths), size), filling)
    for n, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        row[:length] = torch.randint(MASK + 1, TOKENS, (length,), generator=seeded(n))
        row[0] = START
        row[length - 1] = END
    return tokens


# ── the pooling operator ────────────────────────────────────────────────────────────────────────────────


def theta_by_hand(pool: GPO, size: int) -> list[float]:
    """θ(·, size), one position and one gate at a time, from the GRU's own equations."""
    codes = []
    for k in range(size):
        omegas = [10000 ** (-2 * i / pool.code) for i in range(pool.code // 2)]
        waves = [wave(k * omega) for omega in omegas for wave in (math.sin, math.cos)]
        codes.append(torch.tensor(waves, dtype=torch.float64))
    hidden: list[list[Tensor]] = [[], []]
    for direction, suffix in enumerate(("", "_reverse")):
        w_in, w_rec, b_in, b_rec = (
            getattr(pool.gru, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = torch.zeros(pool.gru.hidden_size, dtype=torch.float64)
        for code in codes if direction == 0 else codes[::-1]:
            (r_in, z_in, n_in), (r_rec, z_rec, n_rec) = (w_in @ code + b_in).chunk(3), (w_rec @ h + b_rec).chunk(3)
            r, z = torch.sigmoid(r_in + r_rec), torch.sigmoid(z_in + z_rec)
            h = (1 - z) * torch.tanh(n_in + r * n_rec) + z * h
            hidden[direction].append(h)
    scores = [
        float((forth + back) / 2 @ pool.score.weight[0]) / pool.temperature
        for forth, back in zip(hidden[0], hidden[1][::-1], strict=True)
    ]
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@torch.no_grad()
def test_gpo_is_its_definition() -> None:
    pool = GPO(code=6, hidden=5, temperature=0.7).double()
    values = ragged(LENGTHS.tolist(), 3, 5, math.nan).double()
    pooled = pool(values, torch.arange(5) < LENGTHS[:, None])
    for n, length in enumerate(LENGTHS.tolist()):
        theta = theta_by_hand(pool, length)
        for d in range(3):
            ordered = sorted(values[n, :length, d].tolist(), reverse=True)
            expected = sum(weight * value for weight, value in zip(theta, ordered, strict=True))
            assert pooled[n, d].item() == pytest.approx(expected, abs=1e-12)


@torch.no_grad()
def test_gpo_can_be_the_mean_and_the_maximum() -> None:
    values, mask = ragged(LENGTHS.tolist(), 3, 5, 0.0).double(), torch.arange(5) < LENGTHS[:, None]
    pool = GPO(code=8, hidden=1).double()
    pool.score.weight.zero_()
    assert pool(values, mask).allclose(values.sum(1) / LENGTHS[:, None])
    # h = tanh(10⁶ (cos ωk − c)) with c between k = 0 and k = 1: +1 at the first position, −1 at all others
    for parameter in pool.gru.parameters():
        parameter.zero_()
    omega = 10000 ** (-2 / 8)
    for suffix in ("", "_reverse"):
        getattr(pool.gru, f"weight_ih_l0{suffix}")[2, 3] = 1e6
        getattr(pool.gru, f"bias_ih_l0{suffix}")[2] = -1e6 * (1 + math.cos(omega)) / 2
        getattr(pool.gru, f"bias_ih_l0{suffix}")[1] = -1e3  # the update gate is shut: h = n
    pool.score.weight.fill_(100.0)
    assert pool(values, mask).allclose(values.masked_fill(~mask[..., None], -torch.inf).amax(1))


def test_gpo_knows_no_order_and_gradients_reach_all_of_it() -> None:
    pool = GPO()
    values = torch.randn(2, 7, 3, requires_grad=True)
    assert pool(values).allclose(pool(values[:, torch.randperm(7)]), atol=1e-6)
    pool(values).square().sum().backward()
    assert values.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pool.parameters())
    assert (values.grad != 0).all()
    small = GPO(code=2, hidden=2, temperature=1.0).double()
    values = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: small(v, torch.tensor([[True, True, False], [True] * 3])), values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPO(code=3), "code must be even"),
        (lambda: GPO(temperature=0), "temperature must be > 0"),
        (lambda: GPO()(torch.zeros(2, 3)), r"values must have shape \(N, L, D\)"),
        (lambda: GPO()(torch.zeros(2, 3, 4), torch.ones(2, 3)), r"mask must be \(2, 3\) bool"),
        (lambda: GPO()(torch.zeros(2, 3, 4), torch.tensor([[True] * 3, [False] * 3])), "set 1 has no real"),
    ],
)
def test_gpo_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ── sets: padding and draws ─────────────────────────────────────────────────────────────────────────────

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "input": lambda: RegionImage(6, DIM, "input", drop=0.4),
    "projected": lambda: RegionImage(6, DIM, "projected", drop=0.4),
    "tokens": lambda: TokenText(6, DIM, drop=0.4),
    "last": lambda: GRUText(TOKENS, DIM, 8, masking=0.4),
    "gpo": lambda: GRUText(TOKENS, DIM, 8, "gpo", masking=0.4),
    "states": lambda: WordStates(TOKENS, DIM, 8, masking=0.4),
}
LONGER = LENGTHS + 1  # a sentence is at least <start> <end>


def given(name: str, size: int, filling: float) -> tuple[Tensor, Tensor]:
    if name in ("last", "gpo", "states"):
        return sentences(LONGER.tolist(), size, -7 if math.isnan(filling) else int(filling)), LONGER
    return ragged(LENGTHS.tolist(), 6, size, filling), LENGTHS


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(name: str, training: bool) -> None:
    results = []
    for size, filling in ((6, 0.0), (6, math.nan), (9, math.nan)):
        torch.manual_seed(1)
        encoder = ENCODERS[name]().train(training)
        e = encoder(*given(name, size, filling), seeded(3))
        e.square().sum().backward()
        gradients = [p.grad for p in encoder.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        results.append([e[:, :6] if name == "states" else e, *encoder.buffers(), *gradients])
        if name == "states":
            assert (e[torch.arange(size) >= LONGER[:, None]] == 0).all()
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_set_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    encoder = ENCODERS[name]().eval()
    values, lengths = given(name, 6, math.nan)
    e = encoder(values, lengths)
    for n, length in enumerate(lengths.tolist()):
        alone = encoder(values[n : n + 1, :length])[0]
        assert alone.allclose(e[n, :length] if name == "states" else e[n], atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_draws_come_from_the_generator_or_from_torch(name: str) -> None:
    encoder = ENCODERS[name]()
    values, lengths = given(name, 6, 0.0)
    assert torch.equal(encoder(values, lengths, seeded(1)), encoder(values, lengths, seeded(1)))
    assert not torch.equal(encoder(values, lengths, seeded(1)), encoder(values, lengths, seeded(2)))
    before = torch.get_rng_state()
    encoder(values, lengths, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = encoder(values, lengths)
    torch.manual_seed(5)
    assert torch.equal(first, encoder(values, lengths))
    encoder.eval()
    before = torch.get_rng_state()
    assert torch.equal(encoder(values, lengths), encoder(values, lengths, seeded(1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["input", "projected", "tokens"])
def test_features_come_in_any_float(name: str) -> None:
    """float16 is what large files hold."""
    encoder = ENCODERS[name]().eval()
    values, lengths = given(name, 6, 0.0)
    half = values.half()
    assert torch.equal(encoder(half, lengths), encoder(half.double(), lengths))
    assert encoder.double()(half, lengths).dtype == torch.float64


def test_how_much_is_dropped() -> None:
    mask = torch.arange(50) < torch.randint(1, 51, (400,))[:, None]
    gone = drawn(mask, 0.2, None)
    assert not (gone & ~mask).any()
    share = gone.sum().item() / mask.sum().item()
    assert abs(share - 0.2) < 5 * (0.16 / mask.sum().item()) ** 0.5
    kept = thinned(mask, 0.9, None)
    assert kept.any(1).all()
    assert not (kept & ~mask).any()
    assert (kept.sum(1) == 1)[mask.sum(1) == 1].all()


def test_words_are_masked_and_ends_are_not() -> None:
    states = WordStates(TOKENS, DIM, 8, masking=0.3)
    seen: list[Tensor] = []
    states.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    values, lengths = sentences([30] * 50, 32, PAD), torch.full((50,), 30)
    kept = values.clone()
    states(values, lengths)
    assert torch.equal(values, kept)
    changed = seen[0] != values
    assert (seen[0][changed] == MASK).all()
    assert not changed[(values == START) | (values == END) | (values == PAD)].any()
    assert abs(changed.sum().item() / (28 * 50) - 0.3) < 0.06


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("residual", ["input", "projected"])
@pytest.mark.parametrize("training", [False, True])
def test_regions_by_hand(residual: str, training: bool) -> None:
    encoder = RegionImage(6, DIM, residual, drop=0.0).double().train(training)
    first, norm, _, second = encoder.mlp
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    values = ragged(LENGTHS.tolist(), 6, 5, math.nan).double()
    v = torch.cat([values[n, :length] for n, length in enumerate(LENGTHS)])
    projected = v @ encoder.fc.weight.T + encoder.fc.bias
    hidden = (v if residual == "input" else projected) @ first.weight.T + first.bias
    if training:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
    hidden = (hidden - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    f = projected + relu(hidden) @ second.weight.T + second.bias
    expected = torch.cat([encoder.pool(each[None]) for each in f.split(LENGTHS.tolist())])
    assert encoder(values, LENGTHS).allclose(expected, atol=1e-10)


def test_the_two_residuals_differ_and_size_their_first_layer() -> None:
    widths = {residual: RegionImage(6, DIM, residual).mlp[0].in_features for residual in ("input", "projected")}
    assert widths == {"input": 6, "projected": DIM}


FLOATS = torch.zeros(2, 3, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RegionImage(residual="output"), ValueError, "residual must be 'input'"),
        (lambda: RegionImage(drop=1.0), ValueError, r"drop must be a number in \[0, 1\), got 1.0"),
        (lambda: RegionImage(6, 4)(FLOATS[..., :5]), ValueError, r"\(N, R, D\), not empty, D = 6, got \(2, 3, 5\)"),
        (lambda: RegionImage(6, 4)(FLOATS[0]), ValueError, r"got \(3, 6\)"),
        (lambda: RegionImage(6, 4)(FLOATS.int()), TypeError, "dtypes .*, got torch.int32"),
        (lambda: RegionImage(6, 4)([1.0]), TypeError, "must be a torch.Tensor"),
        (lambda: RegionImage(6, 4)(FLOATS, torch.tensor([3, 0])), ValueError, "lie in 1 … 3, got 0 at position 1"),
        (lambda: RegionImage(6, 4)(FLOATS, torch.tensor([4, 3])), ValueError, "got 4 at position 0"),
        (lambda: RegionImage(6, 4)(FLOATS, torch.tensor([3])), ValueError, r"shape \(2,\), one for each set"),
        (lambda: RegionImage(6, 4)(FLOATS, torch.tensor([3.0, 1.0])), TypeError, "lengths must be integers"),
        (lambda: TokenText(6, 4)(FLOATS[..., :5]), ValueError, r"\(B, L, D\)"),
        (lambda: TokenText(6, 4, drop=-0.1), ValueError, "drop must be"),
        (lambda: Projection(6, 4)(FLOATS), ValueError, r"\(N, D\)"),
        (lambda: Projection(6, 4)(FLOATS[0], torch.tensor([1, 1, 1])), ValueError, "takes one vector an item"),
        (lambda: GRUText(TOKENS, 4, pooling="mean"), ValueError, "pooling must be 'last'"),
        (lambda: GRUText(3, 4), ValueError, r"tokens must be len\(vocabulary\)"),
        (lambda: GRUText(TOKENS, 4, masking=2), ValueError, "masking must be"),
        (lambda: GRUText(TOKENS, 4)(torch.zeros(2, 3)), TypeError, "integer tokens, got torch.float32"),
        (lambda: GRUText(TOKENS, 4)([[1]]), TypeError, "got list"),
        (lambda: GRUText(TOKENS, 4)(torch.zeros(3).long()), ValueError, r"\(B, L\), not empty, got \(3,\)"),
        (lambda: GRUText(TOKENS, 4)(torch.full((1, 2), TOKENS)), ValueError, "tokens 0 … 39, got 40"),
        (lambda: GRUText(TOKENS, 4)(torch.full((1, 2), -1)), ValueError, "got -1"),
        (lambda: AudioVisual(6, 5, 4, 4)(FLOATS[0], torch.zeros(2, 6)), ValueError, r"visual .*D = 5, got \(2, 6\)"),
        (lambda: vse_infinity(), ValueError, "either tokens or d_token, got tokens=None, d_token=None"),
        (lambda: rvse_pp(40, d_token=3), ValueError, "got tokens=40, d_token=3"),
        (lambda: CrossAttention("max"), ValueError, "pooling must be 'lse' or 'mean'"),
        (lambda: CrossAttention(sharpness=0), ValueError, "sharpness must be > 0"),
        (lambda: CrossAttention()(FLOATS, FLOATS[..., :5]), ValueError, r"words must have shape .*D = 6"),
        (lambda: CrossAttention()(FLOATS, FLOATS, None, torch.tensor([9, 1])), ValueError, "word_lengths must lie"),
        (lambda: hard_negatives(FLOATS), ValueError, r"S must have shape \(N, M\)"),
        (lambda: hard_negatives(FLOATS[0], tau=0), ValueError, "tau must be > 0"),
        (lambda: hard_negatives(FLOATS[0], ids=torch.arange(2)), ValueError, "need y_ids"),
        (lambda: matching_pairs(torch.zeros(3, 2)), ValueError, r"\(2, K\)"),
        (lambda: hard_negatives(torch.eye(3) * math.nan), ValueError, r"NaN or \+inf in row 0"),
        (lambda: CrossAttention()(FLOATS, FLOATS.double()), TypeError, "one dtype and one device, got torch.float32"),
        (
            lambda: RegionImage(6, 4)(FLOATS.to_sparse()),
            TypeError,
            "values must be a dense .*, got layout torch.sparse_coo",
        ),
        (
            lambda: RegionImage(6, 4)(FLOATS, np.array([3, 1], ">i8")),
            TypeError,
            "lengths must be integers, .* byte order",
        ),
        (lambda: RegionImage(6, 1), ValueError, "dim must be a whole number >= 2, got 1"),
        (lambda: GPO()(FLOATS.int()), TypeError, "values must have one of the dtypes"),
        (lambda: GPO()([1.0]), TypeError, "values must be a torch.Tensor"),
        (lambda: GRUText(TOKENS, 4)(torch.ones(2, 3, dtype=torch.bool)), TypeError, "integer tokens, got torch.bool"),
        (lambda: GRUText(TOKENS, 4.0), TypeError, "dim must be a whole number"),
        (lambda: Projection(6, -4), ValueError, "dim must be a whole number >= 1, got -4"),
        (
            lambda: AudioVisual(2, 2).standardise(FLOATS[0, :, :2] + 3e38, FLOATS[0, :, :2]),
            ValueError,
            "audio: column 0",
        ),
    ],
)
def test_refusals_name_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [
        lambda n: vse_pp(n(TOKENS), d_image=n(6), dim=n(4), d_word=n(3)),
        lambda n: vse_infinity(n(TOKENS), d_image=n(6), dim=n(4), d_word=n(3)),
        lambda n: rvse_pp(d_token=n(5), d_image=n(6), dim=n(4)),
        lambda n: SCAN(n(TOKENS), n(6), n(4), n(3)),
        lambda n: AudioVisual(n(6), n(5), n(4), n(3), np.float32(0.5)),
        lambda n: GPO(n(4), n(3), np.float32(0.5)),
        lambda n: TokenText(n(6), n(4), np.float32(0.5)),
    ],
)
def test_sizes_may_be_numpys(make: Callable[[type], nn.Module]) -> None:
    expected = {name: value.shape for name, value in make(int).state_dict().items()}
    assert {name: value.shape for name, value in make(np.int64).state_dict().items()} == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_and_lengths_may_be_small_integers(dtype: torch.dtype) -> None:
    encoder, tokens = GRUText(TOKENS, 4).eval(), torch.randint(5, TOKENS, (4, 5))
    assert torch.equal(encoder(tokens.to(dtype), LENGTHS.to(dtype)), encoder(tokens, LENGTHS))


@pytest.mark.parametrize("default", ["meta", torch.float64])
def test_defaults_of_torch_change_nothing(default: Any) -> None:
    vocabulary = Vocabulary(["a", "dog"])
    joint, scan = vse_infinity(len(vocabulary), d_image=6, dim=4, d_word=3), SCAN(len(vocabulary), 6, 4, 3)
    regions = ragged([3, 2], 6, 3, 0.0)

    def outputs() -> list[Tensor]:
        words = vocabulary.encode(["a dog", "a"])
        torch.manual_seed(0)
        s = scan(regions, words)
        return [*words, *joint(regions, words), s, hard_negatives(s, tau=2.0), *matching_pairs(hard_negatives(s))]

    expected = outputs()
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        found = outputs()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_vocabulary_counts_the_training_captions() -> None:
    vocabulary = Vocabulary.of(["b a", "A c", "C's x-ray, a DOG", "c dog"], min_count=2)
    assert vocabulary.words == ("a", "c", "dog")
    assert len(vocabulary) == 8
    tokens, lengths = vocabulary.encode(["dog A!", "", "zebra a a"])
    assert tokens.tolist() == [[START, 7, 5, END, PAD], [START, END, PAD, PAD, PAD], [START, UNKNOWN, 5, 5, END]]
    assert lengths.tolist() == [4, 2, 5]
    assert tokens.dtype == lengths.dtype == torch.int64


def test_vocabulary_looks_at_the_training_split_alone() -> None:
    training, test = goal.data.load("emoji", "train"), goal.data.load("emoji", "test")
    vocabulary = Vocabulary.of(training)
    assert vocabulary.words == Vocabulary.of(training.captions or ()).words
    assert Vocabulary.of(reversed(training.captions or ())).words == vocabulary.words
    with pytest.raises(ValueError, match="split 'train' alone, got 'test'"):
        Vocabulary.of(test)
    share = (vocabulary.encode(test.captions or ())[0] == UNKNOWN).float().mean().item()
    assert 0 < share < 0.3


def test_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    vocabulary = Vocabulary.of(["naïve cats", "naïve 犬"], min_count=1)
    vocabulary.save(path)
    assert Vocabulary.load(path).words == vocabulary.words
    assert [each.name for each in tmp_path.iterdir()] == ["words.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "words.json: no vocabulary"),
        ("[]", r'must be {"words": \[...\]}'),
        ('{"words": "cat"}', "must be"),
        ('{"words": ["cat", "cat"]}', "'cat' is there twice"),
        ('{"words": ["<mask>"]}', "'<mask>' is there twice, or one of the special"),
        ('{"words": [3]}', "words must be texts, got 3"),
        ("\udcff", "no vocabulary"),
        (None, "no such file"),
    ],
)
def test_vocabulary_refuses_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "words.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(path)


def test_vocabulary_refuses_what_is_no_captions() -> None:
    with pytest.raises(TypeError, match="captions must be several texts, got str"):
        Vocabulary(["cat"]).encode("cat")
    with pytest.raises(TypeError, match="captions must be texts, got 3 at position 1"):
        Vocabulary(["cat"]).encode(["cat", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="captions must not be empty"):
        Vocabulary(["cat"]).encode([])
    with pytest.raises(TypeError, match="training must be several texts"):
        Vocabulary.of("cat")


def gru_by_hand(gru: nn.GRU, inputs: Tensor, suffix: str) -> Tensor:
    """(L, D) to the states of one direction (L, hidden), in its own order of time."""
    w_in, w_rec, b_in, b_rec = (
        getattr(gru, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h, states = inputs.new_zeros(gru.hidden_size), []
    for each in inputs:
        (r_in, z_in, n_in), (r_rec, z_rec, n_rec) = (w_in @ each + b_in).chunk(3), (w_rec @ h + b_rec).chunk(3)
        z = torch.sigmoid(z_in + z_rec)
        h = (1 - z) * torch.tanh(n_in + torch.sigmoid(r_in + r_rec) * n_rec) + z * h
        states.append(h)
    return torch.stack(states)


@pytest.mark.parametrize("pooling", ["last", "gpo"])
def test_words_by_hand(pooling: str) -> None:
    encoder = GRUText(TOKENS, DIM, 8, pooling).double()
    values = sentences(LONGER.tolist(), 8, PAD)
    e = encoder(values, LONGER)
    for n, length in enumerate(LONGER.tolist()):
        inputs = encoder.states.embedding.weight[values[n, :length]]
        states = gru_by_hand(encoder.states.gru, inputs, "")
        if pooling == "gpo":
            assert encoder.pool is not None
            back = gru_by_hand(encoder.states.gru, inputs.flip(0), "_reverse").flip(0)
            expected = encoder.pool(((states + back) / 2)[None])[0]
        else:
            expected = states[-1]
        assert e[n].allclose(expected, atol=1e-10)


# ── systems ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_papers_dimensions_are_the_defaults() -> None:
    with torch.device("meta"):
        plain, infinity, r = vse_pp(1000), vse_infinity(1000), rvse_pp(d_token=768)
    for model in (plain, infinity, r):
        assert model.image.fc.out_features == 1024
        assert model.image.fc.in_features == 2048
    assert plain.text.states.gru.hidden_size == infinity.text.states.gru.hidden_size == 1024
    assert plain.text.states.embedding.weight.shape == (1000, 300)
    assert not plain.text.states.gru.bidirectional
    assert infinity.text.states.gru.bidirectional
    assert infinity.text.states.masking == infinity.image.drop == r.text.drop == 0.2
    assert plain.text.states.masking == 0
    assert [each.image.residual for each in (infinity, r)] == ["input", "projected"]
    assert infinity.image.mlp[0].out_features == 512


def test_settings_are_usable() -> None:
    for name, published in SETTINGS.items():
        objective = goal.recipe(published.recipe, T=goal.T.con(margin=published.margin))
        x, y = normalize(torch.randn(2, 4, 8), dim=2).requires_grad_().unbind()
        objective(x, y).backward()
        optimizer = getattr(torch.optim, published.optimizer)
        optimizer([torch.zeros(1)], lr=published.lr, weight_decay=published.weight_decay)
        assert published.drop_epoch < published.epochs, name
    assert SETTINGS["vse-infinity"].warm_up == 1


def test_joint_normalises() -> None:
    values = torch.randn(5, 6), torch.randn(7, 4)
    model = Joint(Projection(6, DIM), Projection(4, DIM))
    x, y = model(*values)
    assert x.allclose(normalize(values[0] @ model.image.fc.weight.T))
    assert torch.equal(y, model.embed_y(values[1]))
    absolute = Joint(model.image, model.text, order=True)
    assert torch.equal(absolute(*values)[0], x.abs())
    assert torch.equal(model.embed_x(values[0]), x)


def test_joint_hands_lengths_and_the_generator_on() -> None:
    model = vse_infinity(TOKENS, d_image=6, dim=DIM, d_word=8)
    images, texts = given("input", 6, math.nan), given("gpo", 8, -7)
    generator, again = seeded(4), seeded(4)
    x, y = model(images, texts, generator)
    assert torch.equal(x, normalize(model.image(*images, again)))
    assert torch.equal(y, normalize(model.text(*texts, again)))


def test_a_zero_vector_stays_zero_and_its_gradient_bounded() -> None:
    model = Joint(Projection(6, DIM), Projection(4, DIM))
    values = torch.zeros(2, 6, requires_grad=True)
    x = model.embed_x(values)
    assert (x == 0).all()
    x.sum().backward()
    assert values.grad is not None
    assert values.grad.abs().max() < 100


@pytest.mark.parametrize("recipe", ["order0", "order++"])
def test_order_embeddings_by_a_double_loop(recipe: str) -> None:
    model = vse_pp(TOKENS, d_image=6, dim=DIM, d_word=8, order=True).double()
    images, texts = torch.randn(5, 6).double(), (sentences([4, 3, 5, 2, 6], 6, PAD), torch.tensor([4, 3, 5, 2, 6]))
    x, y = model(images, texts)
    assert (x >= 0).all()
    s = [[-(torch.relu(y[j] - x[i])).square().sum().sqrt() for j in range(5)] for i in range(5)]
    hinges = [[relu(0.05 + s[i][j] - s[i][i]) for j in range(5) if j != i] for i in range(5)]
    hinges += [[relu(0.05 + s[j][i] - s[i][i]) for j in range(5) if j != i] for i in range(5)]
    expected = sum((sum if recipe == "order0" else max)(each) for each in hinges)  # type: ignore[operator]
    loss = goal.recipe(recipe)(x, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for gradient, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert gradient.allclose(theirs, atol=1e-9)


# ── cross attention ─────────────────────────────────────────────────────────────────────────────────────


def pair_by_hand(v: Tensor, e: Tensor, pooling: str, attention: float, sharpness: float) -> Tensor:
    """S of one image's (R, D) regions and one caption's (L, D) words, as the paper writes it."""
    v, e = normalize(v, dim=1), normalize(e, dim=1)
    s = relu(v @ e.T)  # (R, L)
    scaled = s / s.square().sum(1, keepdim=True).sqrt()
    relevances = []
    for j in range(len(e)):
        weights = torch.exp(attention * scaled[:, j])
        attended = ((weights / weights.sum())[:, None] * v).sum(0)
        relevances.append((e[j] * attended).sum() / attended.norm())
    r = torch.stack(relevances)
    return r.mean() if pooling == "mean" else torch.log(torch.exp(sharpness * r).sum()) / sharpness


REGIONS, WORDS = torch.tensor([4, 2, 3]), torch.tensor([3, 5, 2, 4])


def sides(extra: int = 0, filling: float = math.nan) -> tuple[Tensor, Tensor]:
    v = ragged(REGIONS.tolist(), 5, 4 + extra, filling) + 1.0  # few regions without any similar word
    e = ragged([each + 5 for each in WORDS.tolist()], 5, 10, 0.0)[:, : 5 + extra] + 1.0
    e[torch.arange(5 + extra) >= WORDS[:, None]] = filling
    return v.double().requires_grad_(), e.double().requires_grad_()


@pytest.mark.parametrize("pooling", ["lse", "mean"])
@pytest.mark.parametrize("held", [1, 100, 1 << 22])
def test_cross_attention_by_a_double_loop(monkeypatch: pytest.MonkeyPatch, pooling: str, held: int) -> None:
    monkeypatch.setattr(cross_attention, "_HELD", held)
    v, e = sides()
    s = CrossAttention(pooling, attention=4.0, sharpness=3.0)(v, e, REGIONS, WORDS)
    expected = torch.stack(
        [
            torch.stack([pair_by_hand(v[i, :r], e[j, :w], pooling, 4.0, 3.0) for j, w in enumerate(WORDS.tolist())])
            for i, r in enumerate(REGIONS.tolist())
        ]
    )
    assert s.allclose(expected, atol=1e-12)
    weight = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weight * each).sum(), (v, e)) for each in (s, expected))
    for first, second in zip(ours, theirs, strict=True):
        assert first.allclose(second.nan_to_num(), atol=1e-10)


@pytest.mark.parametrize("pooling", ["lse", "mean"])
def test_padding_changes_no_cross_attention(pooling: str) -> None:
    results = []
    for extra, filling in ((0, 0.0), (0, math.nan), (3, math.nan)):
        v, e = sides(extra, filling)
        s = CrossAttention(pooling)(v, e, REGIONS, WORDS)
        gv, ge = torch.autograd.grad(s.square().sum(), (v, e))
        assert (gv[:, 4:] == 0).all()
        assert (ge[:, 5:] == 0).all()
        results.append((s, gv[:, :4], ge[:, :5]))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.allclose(second, atol=1e-12)


def test_scan_looks_at_no_padding() -> None:
    model = SCAN(TOKENS, d_image=6, dim=DIM, d_word=8).double()
    regions, tokens = ragged(LENGTHS.tolist(), 6, 6, math.nan).double(), sentences(LONGER.tolist(), 8, -7)
    s = model((regions, LENGTHS), (tokens, LONGER))
    for (i, r), (j, w) in itertools.product(enumerate(LENGTHS.tolist()), enumerate(LONGER.tolist())):
        alone = model(regions[i : i + 1, :r], tokens[j : j + 1, :w])
        assert s[i, j].item() == pytest.approx(alone.item(), abs=1e-12)
    s.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_cross_attention_of_zeros_and_of_opposites_is_finite() -> None:
    v = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    e = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[-1.0, -1.0], [0.0, 0.0]]], requires_grad=True)
    for pooling in ("lse", "mean"):
        s = CrossAttention(pooling)(v, e)
        s.sum().backward()
        assert s.isfinite().all()
        for side in (v, e):
            assert side.grad is not None
            assert side.grad.abs().max() < 1e3


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize(
    ("held", "largest"),
    [(1 << 22, 24 * 30 * 6 * 7), (3000, 3000), (500, 24 * 6 * 6)],  # all weights, a block of them, V Vᵀ
)
def test_cross_attention_holds_little_at_once(monkeypatch: pytest.MonkeyPatch, held: int, largest: int) -> None:
    monkeypatch.setattr(cross_attention, "_HELD", held)
    v, e = torch.randn(24, 6, 2, requires_grad=True), torch.randn(30, 7, 2, requires_grad=True)
    kept: list[int] = []
    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            s = CrossAttention()(v, e)
        s.sum().backward()
    assert largest / 2 < seen.elements <= largest
    assert sum(kept) < 2 * 24 * 30 * 6 * 7  # for backward: the inputs, once for each block; the weights are tenfold


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("grouped", [False, True])
def test_hardest_negatives(shape: tuple[int, int], grouped: bool) -> None:
    n, m = shape
    s, k = torch.randn(n, m).round(decimals=1), min(n, m)
    ids, y_ids = (torch.randint(3, (n,)), torch.randint(3, (m,))) if grouped else (torch.arange(n), torch.arange(m))
    found = hard_negatives(s, ids=ids, y_ids=y_ids)
    for i in range(k):
        for direction, (row, own, others) in enumerate(((s[i], ids[i], y_ids), (s[:, i], y_ids[i], ids))):
            negatives = [j for j in range(len(row)) if others[j] != own and j != i]
            best = min(negatives, key=lambda j: (-row[j].item(), j)) if negatives else -1
            assert found[direction, i].item() == best
    if not grouped:
        assert torch.equal(found, hard_negatives(s))


def test_mined_negatives_are_the_objectives() -> None:
    x, y = normalize(torch.randn(2, 9, 6), dim=2).unbind()
    objective = goal.Objective(T="con", P="con")
    objective(x, y)
    assert torch.equal(hard_negatives(objective.stats), hard_negatives(x @ y.T))
    with pytest.raises(ValueError, match="go with S"):
        hard_negatives(objective.stats, tau=1.0)


def test_drawn_negatives_follow_their_odds() -> None:
    s = torch.tensor([[9.0, 0.2, 0.5, -0.3], [0.1, 9.0, 0.4, 0.45], [0.0, 0.3, 9.0, 0.8], [0.6, 0.2, 0.1, 9.0]])
    draws = torch.stack(
        [hard_negatives(s, tau=2.0, generator=generator) for generator in [seeded()] for _ in range(3000)]
    )
    for direction, matrix in enumerate((s, s.T)):
        odds = (2 * matrix.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)).softmax(1)
        for i in range(4):
            counts = draws[:, direction, i].bincount(minlength=4)
            assert counts[i] == 0
            assert (counts / 3000 - odds[i]).abs().max() < 0.04
    alone = hard_negatives(s, tau=2.0, ids=torch.tensor([0, 0, 0, 0]))
    assert (alone == -1).all()
    assert torch.equal(hard_negatives(s, tau=1e6), hard_negatives(s))


def test_matching_pairs_are_all_pairs_and_their_negatives() -> None:
    negatives = torch.tensor([[2, -1, 0], [1, 2, -1]])
    rows, cols, target = matching_pairs(negatives)
    judged = set(zip(rows.tolist(), cols.tolist(), target.tolist(), strict=True))
    assert judged == {(0, 0, 1), (1, 1, 1), (2, 2, 1), (0, 2, 0), (2, 0, 0), (1, 0, 0), (2, 1, 0)}
    assert len(rows) == 7


# ── learning ────────────────────────────────────────────────────────────────────────────────────────────

BATCH = 48


class Emoji:
    """The first training images as vectors and as sets, with one caption each as features, tokens and words."""

    def __init__(self) -> None:
        pairs = goal.data.load("emoji", "train")
        assert pairs.y is not None
        assert pairs.captions is not None
        self.vocabulary = Vocabulary.of(pairs, min_count=1)
        x, y = torch.from_numpy(pairs.x[:BATCH]), torch.from_numpy(pairs.y[: 5 * BATCH : 5])
        self.x, self.y = normalize(x - x.mean(0)), normalize(y - y.mean(0))
        self.regions, self.parts = 4 * self.x.view(BATCH, 10, 128), 4 * self.y.view(BATCH, 6, 64)
        self.texts = self.vocabulary.encode(pairs.captions[: 5 * BATCH : 5])


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    return Emoji()


def systems(emoji: Emoji) -> dict[str, tuple[nn.Module, tuple[Any, Any]]]:
    size = len(emoji.vocabulary)
    small: dict[str, Any] = {"dim": 32, "d_word": 16}
    return {
        "vse++": (vse_pp(size, d_image=1280, **small), (emoji.x, emoji.texts)),
        "order0": (vse_pp(size, d_image=1280, order=True, **small), (emoji.x, emoji.texts)),
        "order++": (vse_pp(size, d_image=1280, **small), (emoji.x, emoji.texts)),
        "vse-infinity": (vse_infinity(size, d_image=128, **small), (emoji.regions, emoji.texts)),
        "rvse++": (rvse_pp(d_token=64, d_image=128, **small), (emoji.regions, emoji.parts)),
        "scan": (SCAN(size, d_image=128, **small), (emoji.regions, emoji.texts)),
        "audio-visual": (AudioVisual(384, 1280, 64, 32), (emoji.y, emoji.x)),
    }


def rsum(name: str, model: nn.Module, batch: tuple[Any, Any]) -> float:
    model.eval()
    with torch.no_grad():
        out = model(*batch)
    model.train()
    image_of = torch.arange(BATCH)
    if name == "scan":
        return goal.evaluate_similarity(out, image_of).rsum
    return evaluate(*out, image_of, similarity="order" if name.startswith("order") else "dot").rsum


def steps(name: str, model: nn.Module, batch: tuple[Any, Any], count: int) -> None:
    """Some steps with the published recipe, and a learning rate for few steps."""
    published = SETTINGS.get(name, SETTINGS["vse++"])
    margin = goal.T.con(margin=published.margin)
    objective = goal.recipe(published.recipe, T=margin)
    optimizer = getattr(torch.optim, published.optimizer)(model.parameters(), lr=5e-3)
    generator = seeded()
    for step in range(count):
        if name == "scan":
            loss = goal.apply_similarity(model(*batch), T=margin, P="con", reduction="sum")
        elif name == "audio-visual":
            loss = goal.apply(*model(*batch), mining="semi-hard", ids=torch.arange(BATCH))
        else:
            warming = published.warm_up and step < count // 4
            loss = (goal.recipe("vse0") if warming else objective)(*model(*batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), published.clip)
        optimizer.step()


NAMES = ["vse++", "order0", "order++", "vse-infinity", "rvse++", "scan", "audio-visual"]


@pytest.mark.parametrize("name", NAMES)
def test_each_system_learns_with_its_recipe(name: str, emoji: Emoji) -> None:
    model, batch = systems(emoji)[name]
    before = rsum(name, model, batch)
    steps(name, model, batch, 40)
    assert rsum(name, model, batch) > before + 60
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name: str, emoji: Emoji) -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        model, batch = systems(emoji)[name]
        steps(name, model, batch, 2)
        ends.append(list(model.state_dict().values()))
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(name: str, autocast: bool, emoji: Emoji) -> None:
    model, batch = systems(emoji)[name]
    model.eval()
    expected = model(*batch)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*batch)
    else:
        out = model.bfloat16()(*batch)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.01
        assert (ours - theirs).abs().max() < 0.1 or name == "scan"  # whose cut at 0 magnifies what lies near it
    loss = out.square().sum() if name == "scan" else goal.apply(*out)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_back_from_a_file(name: str, emoji: Emoji, tmp_path: Path) -> None:
    model, batch = systems(emoji)[name]
    other, _ = systems(emoji)[name]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert rsum(name, model, batch) == rsum(name, other, batch)


# ── a model of X-VLM's shape ────────────────────────────────────────────────────────────────────────────


class Aligner(nn.Module):
    """Two encoders of sets, similarities from their means, and a cross encoder with a matching head."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(1280, 8 * 32), WordStates(tokens, 32, 32)
        self.cross = nn.MultiheadAttention(32, 2, batch_first=True)
        self.match = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def encode(self, images: Tensor, texts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (N, 8, 32), words (M, L, 32), and S (N, M)."""
        v, w = self.image(images).unflatten(1, (8, 32)), self.text(*texts)
        x, y = normalize(v.mean(1), dim=1), normalize(w.sum(1), dim=1)
        return v, w, x @ y.T

    def judge(self, v: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
        """(E, 8, 32), (E, L, 32) to logits (E,): words attend regions."""
        attended, _ = self.cross(w, v, v)
        real = (torch.arange(w.shape[1]) < lengths[:, None])[..., None]
        mean = torch.cat((attended * w, attended - w), 2).masked_fill(~real, 0).sum(1) / lengths[:, None]
        logits: Tensor = self.match(mean).squeeze(1)
        return logits


def test_a_model_of_xvlms_shape_learns_end_to_end(emoji: Emoji) -> None:
    model = Aligner(len(emoji.vocabulary))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    lengths, generator = emoji.texts[1], seeded()
    contrastive, matching, correct = [], [], []
    for _ in range(150):
        v, w, s = model.encode(6 * emoji.x, emoji.texts)
        itc = goal.apply_similarity(s, T="cir", P="sig-ms")
        rows, cols, target = matching_pairs(hard_negatives(s, tau=10.0, generator=generator))
        logits = model.judge(v[rows], w[cols], lengths[cols])
        itm = binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        (itc + itm).backward()
        optimizer.step()
        contrastive.append(itc.item())
        matching.append(itm.item())
        correct.append((((logits > 0) == (target > 0.5)).float().mean()).item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(contrastive[-10:]) < sum(contrastive[:10])
    assert sum(matching[-10:]) < 0.8 * sum(matching[:10])
    chance = 2 / 3  # always "no": two negatives for each pair
    assert sum(correct[-10:]) / 10 > chance + 0.1
