"""`Pairs` and its readers: the built-in `emoji`, the field's folders, plain pairs of feature files."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goal.data.files import chunks, read_array, read_features, read_lines
from goal.data.int8 import dequantise
from goal.data.maps import ByPath

EMOJI = Path(__file__).parent / "emoji"
EMOJI_SPLITS = ("train", "val", "test")
COPIES = 5  # in releases that store an image once per caption
FORMATS = (".npy", ".safetensors")


@dataclass(frozen=True, eq=False)
class Pairs(ByPath):
    """Images, captions, and which image each caption describes.

    Memory maps are pickled, and so sent to other processes, as their file's path.

    Attributes:
        name: "emoji", or the name of the folder or file they come from.
        split: "train", "val", "test", or as the files spell it.
        x: (n_images, D) or (n_images, R, D) image features: float32, or a read-only memory map in the file's
            dtype (float16, float32 or float64).
        y: (n_captions, D_y) features of captions, or (n_captions, L, D_y) of their tokens, ended by rows of zeros; of
            the same kinds; None where captions are only text.
        image_of: (n_captions,) int64, the row of x that each caption describes.
        captions: n_captions texts; None where captions are only features.

    >>> pairs = load("emoji", "test")
    >>> pairs.x.shape, pairs.y.shape, pairs.image_of[:6]
    ((330, 1280), (1650, 384), array([0, 0, 0, 0, 0, 1]))
    """

    name: str
    split: str
    x: NDArray[Any]
    y: NDArray[Any] | None
    image_of: NDArray[np.int64]
    captions: tuple[str, ...] | None


def load(name_or_path: str | Path, split: str) -> Pairs:
    """One split of a dataset by its name, or of a folder in the layout of `precomp` or of `paired_folder`.

    A folder that is itself called emoji is meant by "./emoji" or Path("emoji").

    Raises:
        ValueError: neither a known name nor a folder in a known layout, an unknown split, bad files.

    >>> load("emoji", "val").split
    'val'
    """
    if name_or_path == "emoji":
        return emoji(split)
    folder = Path(name_or_path)
    if not os.path.isdir(folder):
        raise ValueError(f"name_or_path: {str(name_or_path)!r} is no folder and no dataset; known: 'emoji'.")
    if any(splits_of(root, "_ims.npy") for root in precomp_roots(folder)):
        return precomp(folder, split)
    if any(splits_of(folder, f"_x{suffix}") for suffix in FORMATS):
        return paired_folder(folder, split)
    raise ValueError(
        f"name_or_path: {folder} holds no {{split}}_ims.npy, no precomp/{{split}}_ims.npy, "
        "no {split}_x.npy and no {split}_x.safetensors."
    )


def emoji(split: str) -> Pairs:
    """The built-in dataset: 1652 drawings of emoji with five captions each, as frozen features.

    x is (n, 1280), of EfficientNet-Lite0; y is (5 n, 384), of MiniLM-L6-v2; caption j describes image j // 5.
    Variants of one emoji and near-duplicate drawings never straddle a split.

    Raises:
        ValueError: unknown split.

    >>> {split: len(emoji(split).x) for split in ("train", "val", "test")}
    {'train': 1157, 'val': 165, 'test': 330}
    """
    if split not in EMOJI_SPLITS:
        raise ValueError(f"split: emoji has no {split!r}; known: {', '.join(map(repr, EMOJI_SPLITS))}.")
    images = np.flatnonzero([image["split"] == split for image in emoji_images()])  # (n,)
    captions = read_lines(EMOJI / "captions.txt")
    chosen = (5 * images[:, None] + np.arange(5)).ravel()  # (5 n,)

    def features(name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        scale = np.load(EMOJI / f"{name}_scale.npy", allow_pickle=False)
        return dequantise(np.load(EMOJI / f"{name}.npy", allow_pickle=False)[rows], scale[rows])

    return Pairs(
        name="emoji",
        split=split,
        x=features("x", images),
        y=features("y", chosen),
        image_of=np.arange(len(images)).repeat(5),
        captions=tuple(captions[i] for i in chosen),
    )


def emoji_images() -> list[dict[str, str]]:
    """Codepoints, emoji, name, group and split of each image, in the order of the shipped features."""
    header, *rows = (line.split("\t") for line in read_lines(EMOJI / "images.tsv"))
    return [dict(zip(header, row, strict=True)) for row in rows]


def precomp(folder: str | Path, split: str) -> Pairs:
    """One split of a folder as the VSE++, SCAN and VSE∞ releases lay them out, memory-mapped.

    | file, in the folder or in its subfolder `precomp` | what |
    |---|---|
    | `{split}_ims.npy` | (N, D) or (N, regions, D) image features |
    | `{split}_caps.txt` | one caption a line, in the order of the images, equally many for each |
    | `{split}_caps.npy` | (n_captions, D_y) sentence, or (n_captions, L, D_y) token features, y; or text, or both |
    | `{split}_ids.txt` | optional: one id for each row of images, or for each caption |

    With as many image rows as captions, the rows are five copies of each image if they are equal in fives
    (x is then every fifth row), else each has one caption. "val" also finds the field's "dev".

    Raises:
        ValueError: naming the file, and the row where there is one: a missing file, an unknown split, a
            caption count that is no multiple of the images', NaN or infinity in float32, token features of a caption
            that are all zeros, ids that contradict the order.

    >>> precomp("data/coco_precomp", "dev").x.shape  # doctest: +SKIP
    (1000, 36, 2048)

    Source: the layout of Faghri et al., VSE++ (BMVC 2018) and Lee et al., SCAN (ECCV 2018).
    """
    folder = Path(folder)
    root = next((root for root in precomp_roots(folder) if splits_of(root, "_ims.npy")), folder)
    split = split_on_disk(root, split, ["_ims.npy"])
    images_file, texts_file, ids_file, y_file = (
        root / f"{split}_{name}" for name in ("ims.npy", "caps.txt", "ids.txt", "caps.npy")
    )
    y = read_features(y_file, "y", ndim=(2, 3), tokens=True) if os.path.lexists(y_file) else None
    captions = tuple(read_lines(texts_file)) if os.path.lexists(texts_file) else None
    count = y if captions is None else captions
    if count is None:
        raise ValueError(f"{texts_file}: no such file, and no {y_file.name} either.")
    if y is not None and len(y) != len(count):
        raise ValueError(f"{y_file}: {len(y)} rows for the {len(count)} captions of {texts_file.name}.")
    x = read_features(images_file, "x", ndim=(2, 3))
    if len(x) == len(count) and are_copies(x, images_file.name):
        x = x[::COPIES]
    image_of = consecutive(len(x), images_file, len(count), y_file if captions is None else texts_file)
    if os.path.lexists(ids_file):
        check_ids(ids_file, len(x), image_of)
    return Pairs(folder.resolve().name, split, x, y, image_of, captions)


def paired_folder(folder: str | Path, split: str) -> Pairs:
    """One split of a folder of plain feature files: {split}_x, {split}_y and, optionally, {split}_image_of.

    Each is a `.npy` or a `.safetensors` file, as in `paired`. "val" also finds "dev".

    Raises:
        ValueError: as `paired`; an unknown split; both formats of one file.

    >>> paired_folder("data/clip", "test").y.shape  # doctest: +SKIP
    (5000, 512)
    """
    folder = Path(folder)
    split = split_on_disk(folder, split, [f"_x{suffix}" for suffix in FORMATS])
    x_file, y_file = only_file(folder, f"{split}_x"), only_file(folder, f"{split}_y")
    if x_file is None or y_file is None:
        missing = "x" if x_file is None else "y"
        raise ValueError(f"{folder / f'{split}_{missing}'}.npy or .safetensors: no such file.")
    image_of_file = only_file(folder, f"{split}_image_of")
    return paired(x_file, y_file, image_of_file, name=folder.resolve().name, split=split)


def paired(
    x_file: str | Path,
    y_file: str | Path,
    image_of_file: str | Path | None = None,
    *,
    name: str | None = None,
    split: str = "test",
) -> Pairs:
    """Two files of features, say of CLIP: (n_images, D) or (n_images, R, D), and (n_captions, D_y) or (…, L, D_y).

    `image_of_file` holds (n_captions,) integers; without it, captions lie in the order of the images, equally
    many for each. `.npy` files are memory-mapped; of `.safetensors` files the only tensor, or the one named
    "x", "y" or "image_of", is read as float32.

    Args:
        name: the pairs' name; by default the name of `x_file` without its ending.
        split: only a label.

    Raises:
        ValueError: naming the file, and the row where there is one: a missing file, another shape or dtype,
            NaN or infinity in float32, token features of a caption that are all zeros, a caption count that is no
            multiple of the images', a row that names no image.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "images.npy", np.eye(2, 4, dtype=np.float32))
    >>> np.save(folder / "texts.npy", np.ones((6, 4), np.float32))
    >>> paired(folder / "images.npy", folder / "texts.npy").image_of
    array([0, 0, 0, 1, 1, 1])
    """
    x_file, y_file = Path(x_file), Path(y_file)
    x = read_features(x_file, "x", ndim=(2, 3))
    y = read_features(y_file, "y", ndim=(2, 3), tokens=True)
    if image_of_file is None:
        image_of = consecutive(len(x), x_file, len(y), y_file)
    else:
        image_of = read_image_of(Path(image_of_file), len(x), len(y))
    return Pairs(x_file.stem if name is None else name, split, x, y, image_of, captions=None)


def precomp_roots(folder: Path) -> tuple[Path, Path]:
    return folder, folder / "precomp"


def splits_of(folder: Path, ending: str) -> list[str]:
    return sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))


def split_on_disk(folder: Path, split: str, endings: Sequence[str]) -> str:
    """The split as the files spell it: itself, or "dev" for "val"."""
    known = sorted({name for ending in endings for name in splits_of(folder, ending)})
    spelled = "dev" if split == "val" and "val" not in known else split
    if spelled not in known:
        wanted = " or ".join(f"{split}{ending}" for ending in endings)
        raise ValueError(f"split: {folder} has no {wanted}; known: {', '.join(map(repr, known)) or 'none'}.")
    return spelled


def only_file(folder: Path, stem: str) -> Path | None:
    found = [path for suffix in FORMATS if os.path.lexists(path := folder / f"{stem}{suffix}")]
    if len(found) > 1:
        raise ValueError(f"{folder}: {found[0].name} and {found[1].name} both exist, keep one.")
    return found[0] if found else None


def are_copies(rows: NDArray[Any], file_name: str) -> bool:
    """Whether all rows are five equal copies, one after another; stops at the first that are not."""
    if len(rows) % COPIES:
        return False
    for _, chunk in chunks(rows, f"comparing copies in {file_name}", multiple=COPIES):
        fives = chunk.reshape(len(chunk) // COPIES, COPIES, -1)
        if not (fives == fives[:, :1]).all():
            return False
    return True


def consecutive(n_images: int, images_file: Path, n_captions: int, captions_file: Path) -> NDArray[np.int64]:
    """(n_captions,) 0 … 0, 1 … 1, …: equally many captions for each image, in order."""
    if n_captions == 0 or n_captions % n_images:
        images = f"{n_images} images of {images_file.name}"
        raise ValueError(f"{captions_file}: {n_captions} captions, no multiple of the {images}.")
    return np.arange(n_images, dtype=np.int64).repeat(n_captions // n_images)


def check_ids(path: Path, n_images: int, image_of: NDArray[np.int64]) -> None:
    """Refuse ids, of images or of captions, that say something else than `image_of`."""
    ids = [unicodedata.normalize("NFC", identity) for identity in read_lines(path)]
    if len(ids) not in (n_images, len(image_of)):
        raise ValueError(f"{path}: {len(ids)} ids for {n_images} images and {len(image_of)} captions.")
    if len(set(ids)) == len(ids):  # each image's, or each caption's own
        return
    images = (image_of if len(ids) == len(image_of) else np.arange(n_images)).tolist()
    image_with: dict[str, int] = {}
    id_of: dict[int, str] = {}
    for row, (identity, image) in enumerate(zip(ids, images, strict=True)):
        first, own = image_with.setdefault(identity, image), id_of.setdefault(image, identity)
        if first != image:
            raise ValueError(f"{path}: row {row} gives image {image} the id {identity!r} of image {first}.")
        if own != identity:
            raise ValueError(f"{path}: row {row} gives image {image} the id {identity!r}, it had {own!r}.")


def read_image_of(path: Path, n_images: int, n_captions: int) -> NDArray[np.int64]:
    image_of = read_array(path, "image_of")
    if image_of.shape != (n_captions,) or image_of.dtype.kind not in "iu":
        got = f"{image_of.shape} {image_of.dtype}"
        raise ValueError(f"{path}: must be ({n_captions},) integers, one for each caption; got {got}.")
    bad = (image_of < 0) | (image_of >= n_images)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{path}: row {row} is {image_of[row]}, there are images 0 to {n_images - 1}.")
    return image_of.astype(np.int64)
