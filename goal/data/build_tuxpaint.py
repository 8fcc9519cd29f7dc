"""Builds `tuxpaint`: drawings with spoken descriptions and sounds, the stamps of the children's program Tux Paint.

    drawings (Debian's tuxpaint-stamps-default)         → EfficientNet-Lite0, pooled → (n, 1280)
    recordings: descriptions in 14 languages and sounds → log-mel energies           → (n, 640)
    the folder of a stamp                               → class
    variants and near-duplicates                        → groups → train / val / test

A row is a recording with the drawing of its stamp. The same package gives the same bytes.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goal.data.files import atomic_file, read_lines, sha256, write_atomically, write_provenance
from goal.data.groups import NEAR_DUPLICATE, group, split_by_class
from goal.data.networks import IMAGE_PACKAGES, image_features, image_network, one_thread
from goal.data.sounds import SOUND_PACKAGES, sound_features

SEED = 0  # the split: which groups go to val and test
LEAST_STAMPS = 10  # of a class; smaller ones are left out, since val would have none of them
COLUMNS = ("split", "stamp", "class", "kind", "group")
SPLITS = ("train", "val", "test")
DEBIAN = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")
DOC = Path("usr/share/doc", DEBIAN)
LICENCES = ("copyright", "changelog.gz")  # the second names contributors, and licences of single pictures and sounds
RECORDING = re.compile(r"(?P<stamp>.+?)(?P<described>_desc(_(?P<language>\w+))?)?")  # a file's name without its ending
VARIANT = re.compile(r"(?<=[^/\d_-])([-_]?(mirror|\d+))+$")  # what tells variants apart: the end of a name, never all


@dataclass(frozen=True)
class Stamp:
    """A drawing and its recordings."""

    path: str  # in the folder of stamps and without an ending: "animals/birds/owl"
    drawing: Path
    text: str  # its description in English, or none
    recordings: dict[str, Path]  # by kind: the language of a description, as "fr" or "pt_BR", or "sound"

    @property
    def label(self) -> str:
        """Its class: the folder that it lies in."""
        return self.path.split("/")[0]


def build(out: Path, package: Path | None = None) -> None:
    """Build the dataset `tuxpaint` into the folder `out`, for `goal.data.clips`.

    Takes about two minutes. provenance.json comes last and has the SHA-256 of the other files.

    Args:
        out: the folder.
        package: Debian's tuxpaint-stamps-default as a file; by default `apt-get download` fetches it.

    Raises:
        ModuleNotFoundError: a package of the extra `build` is missing.
        ValueError: Debian's package cannot be fetched or unpacked, or is another one.

    >>> build(Path("tuxpaint"), package=Path("tuxpaint-stamps-default.deb"))  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        deb = fetched(Path(folder)) if package is None else package
        root = unpacked(deb, Path(folder, "unpacked"))
        version = run("dpkg-deb", "--field", str(deb), "Version").strip()
        out.mkdir(parents=True, exist_ok=True)
        for name in LICENCES:
            write_atomically(out / name, (root / DOC / name).read_bytes())
        build_from(root / STAMPS, out, {"name": DEBIAN, "sha256": sha256(deb), "version": version})


# the package


def fetched(folder: Path) -> Path:
    """The package's file, which the package client downloads into a folder."""
    by_hand = f"or get the file of Debian's package {DEBIAN} elsewhere and name it: --package FILE.deb"
    if shutil.which("apt-get") is None:
        raise ValueError(f"package: there is no apt-get here to fetch it; build on Debian or Ubuntu, {by_hand}.")
    try:
        run("apt-get", "download", DEBIAN, folder=folder)
    except ValueError as error:
        raise ValueError(f"package: {error}; run apt-get update and try again, {by_hand}.") from error
    return next(folder.glob("*.deb"))


def unpacked(deb: Path, folder: Path) -> Path:
    """The folder, with the package's files in it; nothing is installed."""
    if not deb.is_file():
        raise ValueError(f"{deb}: no such file.")
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"{deb}: there is no dpkg-deb here to unpack it; install dpkg, or build on Debian or Ubuntu.")
    try:
        run("dpkg-deb", "--extract", str(deb), str(folder))
    except ValueError as error:
        raise ValueError(f"{deb}: no Debian package: {error}") from error
    for needed in (STAMPS, *(DOC / name for name in LICENCES)):
        if not (folder / needed).exists():
            raise ValueError(f"{deb}: holds no {needed}; it must be Debian's package {DEBIAN}.")
    return folder


def run(*command: str, folder: Path | None = None) -> str:
    """What a command prints; what it complains of, as a ValueError."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


# from its files to arrays


def build_from(root: Path, out: Path, source: dict[str, str]) -> None:
    """Build the dataset from a folder of stamps; provenance.json says that it is from `source`."""
    stamps, small = of_large_classes(read_stamps(root))
    clips = [(row, kind) for row, stamp in enumerate(stamps) for kind in sorted(stamp.recordings)]
    sounds = [stamps[row].recordings[kind] for row, kind in clips]
    with one_thread():
        audio = sound_features(sounds)
        visual = image_features(image_network(), [stamp.drawing for stamp in stamps])
    heard = np.flatnonzero(audio.any(axis=1)).tolist()  # what makes no sound may have a recording of silence

    keys = [same_thing(stamp) for stamp in stamps]
    for clip in heard:
        keys[clips[clip][0]].append(sha256(sounds[clip]))
    groups = group(visual, keys)
    classes = sorted({stamp.label for stamp in stamps})
    labels = [classes.index(stamp.label) for stamp in stamps]
    split = split_by_class(groups, labels, np.random.default_rng(SEED))

    table = []  # a row of clips.tsv for each clip
    for name in SPLITS:
        chosen = [clip for clip in heard if split[clips[clip][0]] == name]
        rows = [clips[clip][0] for clip in chosen]  # of their stamps
        with atomic_file(out / f"{name}.npz") as file:
            np.savez(file, audio=audio[chosen], visual=visual[rows], labels=np.array(labels)[rows])
        for row, kind in (clips[clip] for clip in chosen):
            table.append((name, stamps[row].path, stamps[row].label, kind, str(groups[row])))
    lines = ["\t".join(row) for row in [COLUMNS, *table]]
    write_atomically(out / "clips.tsv", "".join(f"{line}\n" for line in lines).encode())
    write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    write_provenance(
        out,
        files=[*(f"{name}.npz" for name in SPLITS), "clips.tsv", "classes.txt"],
        packages=[*IMAGE_PACKAGES, *SOUND_PACKAGES, "resvg-py"],
        counts=counts(table),
        debian_package=source,
        left_out={"silent recordings": len(clips) - len(heard), "stamps of small classes": small},
        near_duplicate_cosine=NEAR_DUPLICATE,
        seed=SEED,
    )


def read_stamps(root: Path) -> list[Stamp]:
    """All stamps that have a recording, by path; of a drawing in two formats, the pixels."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    drawings = {path.with_suffix(""): path for ending in (".svg", ".png") for path in files if path.suffix == ending}
    recordings: dict[Path, dict[str, Path]] = {drawing: {} for drawing in sorted(drawings)}
    for path in files:
        named = RECORDING.fullmatch(path.stem)
        if path.suffix not in (".ogg", ".wav") or named is None or path.with_name(named["stamp"]) not in recordings:
            continue
        kind = named["language"] or "en" if named["described"] else "sound"
        recordings[path.with_name(named["stamp"])][kind] = path
    return [
        Stamp(path.relative_to(root).as_posix(), drawings[path], description(path.with_suffix(".txt")), own)
        for path, own in recordings.items()
        if own
    ]


def description(path: Path) -> str:
    """The first line of a stamp's text, which is English; translations follow it."""
    return next(iter(read_lines(path)), "") if path.is_file() else ""


def of_large_classes(stamps: Sequence[Stamp]) -> tuple[list[Stamp], dict[str, int]]:
    """The stamps of classes with enough of them for three splits, and how many the other classes have."""
    size = Counter(stamp.label for stamp in stamps)
    small = {label: n for label, n in size.items() if n < LEAST_STAMPS}
    return [stamp for stamp in stamps if stamp.label not in small], small


def same_thing(stamp: Stamp) -> list[str]:
    """Keys that a stamp shares with others of the same thing: its description, its name but for mirror or number.

    >>> same_thing(Stamp("vehicles/iso_lorry2", Path(), "A tanker truck.", {}))
    ['a tanker truck.', 'vehicles/iso_lorry']
    >>> same_thing(Stamp("symbols/math/2", Path(), "", {}))
    ['symbols/math/2']
    """
    return [key for key in (stamp.text.casefold(), VARIANT.sub("", stamp.path)) if key]


def counts(table: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """How many clips and stamps there are: by kind, and for each class by split.

    >>> counts([("train", "toys/car", "toys", "fr", "0"), ("train", "toys/car", "toys", "ru", "0")])["clips"]
    {'toys': Counter({'train': 2})}
    """
    stamps = list({stamp: (split, label, group) for split, stamp, label, _, group in table}.values())
    labels = sorted({label for _, label, _ in stamps})
    return {
        "clips": {label: Counter(row[0] for row in table if row[2] == label) for label in labels},
        "clips by kind": Counter(kind for *_, kind, _ in table),
        "groups": len({group for *_, group in stamps}),
        "stamps": {label: Counter(split for split, own, _ in stamps if own == label) for label in labels},
    }
