"""Captions in any script: one normal form, whole letters, and a word where most of a text is not understood."""

import random
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import goal
from goal import cli
from goal.data import Pairs
from goal.data.files import read_lines
from goal.models import Vocabulary
from goal.models.text import LONGEST, PAD, UNKNOWN
from goal.models.words import normal_form, words_of
from goal.training import systems
from goal.training.features import Split, Words, split

PUBLISHED = re.compile(r"\w+(?:['’]\w+)*")  # of the lower-cased caption: the rule for English

WORDS = {
    "Ein MÄDCHEN läuft": ["ein", "mädchen", "läuft"],
    "STRASSE, Straße": ["strasse", "strasse"],
    "İstanbul ISTANBUL kız": ["istanbul", "istanbul", "kız"],
    "Việt Nam": ["việt", "nam"],
    "don't don’t l'été O'Brien's": ["don't", "don't", "l'été", "o'brien's"],
    "DONʼT don＇t ‘l’été’ é’e’e": ["don't", "don't", "l'été", "é'e'e"],
    "п’ять п'ять пʼять": ["п'ять"] * 3,
    "ＤＯＧ１２ ﬁsh 𝐜𝐚𝐭": ["dog12", "fish", "cat"],
    "dach\u00adboden \ufeffa\u200b b ❤\ufe0f": ["dachboden", "a", "b"],
    "brand™ x² ½ 1\ufe0f\u20e3": ["brand", "x²", "½", "1"],
    "col·lecció": ["col·lecció"],
    "लड़की दौड़ती": ["लड़की", "दौड़ती"],
    "क्\u200dष क्ष": ["क्ष", "क्ष"],
    "السَّلامُ كتـــاب": ["السَّلامُ", "كتاب"],
    "می\u200cخواهم": ["میخواهم"],
    "שָׁלוֹם צה״ל": ["שָׁלוֹם", "צה״ל"],
    "한국어 문장": ["한국어", "문장"],
    "女孩在跑步。": ["女", "孩", "在", "跑", "步"],
    "第12天 iPhone手机": ["第", "12", "天", "iphone", "手", "机"],
    "日本語のネコｶﾞ々": ["日", "本", "語", "の", "ネ", "コ", "ガ", "々"],
    "สวัสดี ๑๒ น้ำ": ["ส", "วั", "ส", "ดี", "๑๒", "น้ำ"],
    "ສະບາຍດີ": ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"],
    "ភាសាខ្មែរ": ["ភា", "សា", "ខ្មែ", "រ"],
    "မြန်မာ": ["မြ", "န်", "မာ"],
    "བོད་ཡིག": ["བོད", "ཡིག"],
    "😀 👩\u200d🚀": [],
}


@pytest.mark.parametrize("caption", WORDS)
def test_words_are_the_same_however_they_are_written(caption: str) -> None:
    expected = [unicodedata.normalize("NFC", word) for word in WORDS[caption]]
    for form in ("NFC", "NFD"):
        assert words_of(unicodedata.normalize(form, caption)) == expected, form


def test_the_normal_form_is_one_for_every_character() -> None:
    for code in [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)]:
        character = chr(code)
        normal = normal_form(character)
        forms = {normal_form(unicodedata.normalize(form, character)) for form in ("NFC", "NFD")}
        assert forms == {normal} == {normal_form(normal)}, hex(code)


def test_english_is_cut_as_published() -> None:
    captions = [
        caption for name in ("train", "val", "test") for caption in goal.data.load("emoji", name).captions or ()
    ]
    rng = random.Random(0)
    captions += ["".join(rng.choices("aB9_ '-.,’é", k=30)) for _ in range(500)]
    for caption in captions:
        assert words_of(caption) == PUBLISHED.findall(caption.lower().replace("’", "'"))
    assert len(Vocabulary.of(goal.data.load("emoji", "train"))) == 710


def test_vocabularies_know_both_forms() -> None:
    caption = "Das Mädchen läuft über die Brücke"
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        vocabulary = Vocabulary.of([unicodedata.normalize(form, caption)], min_count=1)
        tokens, _ = vocabulary.encode([unicodedata.normalize(other, caption.upper())])
        assert not (tokens == UNKNOWN).any()
    older = Vocabulary(["straße", "strasse", "dog"])  # of before there was one form
    assert older.words == ("straße", "strasse", "dog")
    assert older.encode(["Straße STRASSE Dog"])[0].tolist() == [[1, 6, 6, 7, 2]]
    curled = Vocabulary(["don’t", "dog"])  # of before its apostrophe was one
    assert curled.encode(["don't don’t DONʼT dog"])[0].tolist() == [[1, 5, 5, 5, 6, 2]]


@pytest.mark.parametrize("min_count", ["1", 1.5, None, True, -1])
def test_a_count_that_is_none_is_refused(min_count: object) -> None:
    with pytest.raises((TypeError, ValueError), match="min_count must be a whole number"):
        Vocabulary.of(["a dog"], min_count=min_count)  # type: ignore[arg-type]
    assert Vocabulary.of(["a dog"], min_count=np.int64(1)).words == ("a", "dog")  # type: ignore[arg-type]


def test_unspaced_captions_have_a_vocabulary() -> None:
    captions = [
        f"一个{who}在{where}第{i}天" for i in range(4) for who in ("女孩", "老人") for where in ("公园", "海边")
    ]
    vocabulary = Vocabulary.of(captions)
    assert set("一个女孩老人在公园海边第天") <= set(vocabulary.words)
    assert not (vocabulary.encode(captions)[0] == UNKNOWN).any()


# ── what is not understood is said ──────────────────────────────────────────────────────────────────────


def said(call: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()  # type: ignore[operator]
    return [str(each.message) for each in caught]


def test_an_empty_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no word occurs 4 times \(min_count\) in 2 captions, .* 3 different words"):
        Vocabulary.of(["a dog", "a cat"])
    with pytest.raises(ValueError, match="in 0 captions"):
        Vocabulary.of([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary.of(["a b c d", "a"], min_count=2), r"of 5 in 2 captions 3 occur fewer than 2 times"),
        (lambda: Vocabulary(["a"]).encode(["ein Hund a"]), "captions: most words are unknown: 2 of 3 .* such as 'ein'"),
        (lambda: Words(["ein"], Vocabulary(["a"]), name="here"), "here: most words are unknown"),
        (lambda: Vocabulary(["a"]).encode(["a", "…"]), "captions: 1 of 2 have no word, such as row 1"),
        (lambda: Vocabulary.of(["a b a", "a"], min_count=2), None),
        (lambda: Vocabulary(["a"]).encode(["a b", *["a"] * 10, ""]), None),
    ],
)
def test_what_is_mostly_unknown_is_said(call: object, message: str | None) -> None:
    told = said(call)
    assert len(told) == (message is not None)
    assert message is None or re.search(message, told[0])


def test_a_saved_vocabulary_of_another_rule_is_said(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    Vocabulary(["a", "在公园里跑步"]).save(path)
    assert any(
        "1 of 2 words are in no caption, such as '在公园里跑步'" in each for each in said(lambda: Vocabulary.load(path))
    )
    Vocabulary(["a", "straße", "don’t", "é"]).save(path)
    assert said(lambda: Vocabulary.load(path)) == []


def test_training_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("train", "a dog\n"), ("dev", "ein Hund\n"), ("test", "a dog\n")):
        np.save(tmp_path / f"{name}_ims.npy", np.random.default_rng(0).standard_normal((8, 4), np.float32))
        (tmp_path / f"{name}_caps.txt").write_text(text * 8)
    monkeypatch.chdir(tmp_path)
    small = f"--model vse++ --data {tmp_path} --dim 4 --word-dim 4 --batch 4 --max-steps 1 --name a".split()
    assert cli.main(["train", *small]) == 0
    assert "captions of 'dev' (dev_caps.txt): most words are unknown: 16 of 16" in capsys.readouterr().err


# ── lengths ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_caption_widens_only_its_own_batch() -> None:
    captions = ["a dog"] * 3000 + ["dog " * LONGEST]
    vocabulary = Vocabulary(["a", "dog"])
    words = Words(captions, vocabulary)
    held = sum(each.nbytes for each in vars(words).values() if isinstance(each, torch.Tensor))
    assert held < 200_000  # padded it was 24 MB
    assert words[:2][0].shape == (2, 4)
    rows = torch.tensor([3000, 5])
    tokens, lengths = words[rows]
    expected = vocabulary.encode([captions[row] for row in rows])
    assert torch.equal(tokens, expected[0])
    assert torch.equal(lengths, expected[1])
    assert (tokens[1, 4:] == PAD).all()


class Lengths(torch.nn.Module):
    """A model of captions' lengths, which keeps how many tokens it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def embed_x(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def embed_y(self, y: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.sizes.append(tuple(y[0].shape))  # type: ignore[arg-type]
        return y[1][:, None].float()

    def forward(self, x: torch.Tensor, y: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return x @ self.embed_y(y).T


@pytest.mark.parametrize("makes", ["embeddings", "similarities"])
def test_a_long_caption_does_not_pad_those_that_are_scored_with_it(makes: str) -> None:
    lengths = [3, 1] * 200 + [LONGEST] + [2] * 200 + [40] * 300
    y = Words(["a " * length for length in lengths], Vocabulary(["a"]))
    x = torch.ones(300, 1)
    part, model = Split(x, y, torch.arange(len(y)), torch.arange(300)), Lengths()
    made = getattr(systems, makes)(model, part, torch.device("cpu"))
    found = made[1][:, 0] if makes == "embeddings" else made[0]
    assert found.tolist() == [length + 2 for length in lengths]
    assert max(rows * width for rows, width in model.sizes) <= 64 * 256
    assert len(model.sizes) < 15
    ordinary, model = Words(["a " * 40] * 600, Vocabulary(["a"])), Lengths()
    getattr(systems, makes)(model, part._replace(x=x[:4], y=ordinary), torch.device("cpu"))
    assert [rows for rows, _ in model.sizes] == [256, 256, 88]


def test_an_absurdly_long_caption_is_refused_by_its_row() -> None:
    captions = ("a", "a " * (LONGEST + 1), "a")
    with pytest.raises(ValueError, match=f"captions: row 1 has {LONGEST + 1} words, a caption may have {LONGEST}"):
        Vocabulary(["a"]).encode(captions)
    pairs = Pairs("mine", "val", np.ones((3, 2), np.float32), None, np.arange(3), captions)
    with pytest.raises(ValueError, match=r"mine: captions of 'val' \(val_caps.txt\): row 1 has"):
        split(pairs, vocabulary=Vocabulary(["a"]))


# ── files of text ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffa dog\nein Hund é\n".encode(),
        "\ufeff\ufeffa dog\n\ufeffein Hund é".encode(),  # two files with marks, joined
        "a dog\r\nein Hund é\r\n".encode(),
        "a dog\rein Hund é\r".encode(),
        "\ufeff a dog \r ein Hund é".encode(),
    ],
)
def test_marks_and_line_ends_are_no_part_of_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_lines(tmp_path / "a.txt") == ["a dog", "ein Hund é"]


def test_ids_are_compared_as_text(tmp_path: Path) -> None:
    np.save(tmp_path / "test_ims.npy", np.ones((2, 4), np.float32))
    (tmp_path / "test_caps.txt").write_text("a\n" * 6)
    composed, torn = (unicodedata.normalize(form, "bilder/müll") for form in ("NFC", "NFD"))
    ids = ["\ufeff" + composed, torn, composed, "b", "b", "b"]
    (tmp_path / "test_ids.txt").write_text("\n".join(ids), encoding="utf-8")
    assert goal.data.load(tmp_path, "test").image_of.tolist() == [0, 0, 0, 1, 1, 1]
