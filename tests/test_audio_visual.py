"""Readers of labelled audio-visual clips, and heads trained on what they read."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goal
from goal.data import Clips, clips
from goal.models import AudioVisual

pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(n: int = 6, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made = {
        "audio": rng.standard_normal((n, 4)),
        "visual": rng.standard_normal((n, 5), np.float32),
        "labels": np.arange(n) % 3,
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def write_npz(path: Path, **content: Any) -> None:
    np.savez(path, **content)


def write_hdf5(path: Path, **content: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value


WRITERS = {".npz": write_npz, ".h5": write_hdf5, ".hdf5": write_hdf5}


@pytest.mark.parametrize("ending", WRITERS)
def test_clips_are_read_as_written(tmp_path: Path, ending: str) -> None:
    written = arrays(labels=np.array([2, 0, 1, 1, 0, 7], np.uint8))
    WRITERS[ending](tmp_path / f"train{ending}", **written, extra=np.zeros(2))
    read = clips(tmp_path, "train")
    assert (read.name, read.split) == (tmp_path.name, "train")
    for name, dtype in (("audio", np.float32), ("visual", np.float32), ("labels", np.int64)):
        found = getattr(read, name)
        assert found.dtype == dtype
        assert np.array_equal(found, written[name].astype(dtype))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"labels": None}, "no array 'labels'; it holds audio, visual"),
    ({"audio": np.zeros((6, 4), np.int32)}, "audio must be floating point, got int32"),
    ({"audio": np.zeros((6, 10, 4))}, r"audio must be \(n, D\), not empty, got \(6, 10, 4\); average over time first"),
    ({"visual": np.zeros((0, 5))}, r"visual must be \(n, D\), not empty"),
    ({"audio": np.zeros((5, 4))}, "one of each, got 5 audio, 6 visual, 6 labels"),
    ({"labels": np.arange(5)}, "6 visual, 5 labels"),
    ({"visual": np.zeros((7, 5))}, "6 audio, 7 visual, 6 labels"),
    ({"labels": np.zeros((6, 1), int)}, r"labels must be \(n,\) integers, got \(6, 1\) int64"),
    ({"labels": np.zeros(6)}, r"integers, got \(6,\) float64"),
    ({"visual": np.diag([0, 0, np.nan, 0, np.inf, 0])}, "row 2 of visual holds NaN or infinity"),
    ({"audio": np.full((6, 4), 1e300)}, "row 0 of audio holds NaN or infinity"),
]


@pytest.mark.parametrize("ending", [".npz", ".h5"])
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_clips_are_named(tmp_path: Path, ending: str, changes: dict[str, Any], message: str) -> None:
    WRITERS[ending](tmp_path / f"train{ending}", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        clips(tmp_path, "train")
    assert f"train{ending}" in str(raised.value)


def test_files_that_are_no_such_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no train.npz, .h5 or .hdf5; known: none"):
        clips(tmp_path, "train")
    (tmp_path / "train.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"train.npz: no npz file"):
        clips(tmp_path, "train")
    (tmp_path / "train.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.npz: no npz file"):
        clips(tmp_path, "train")
    with (tmp_path / "train.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"train.npz: no npz file"):
        clips(tmp_path, "train")
    np.savez(tmp_path / "val.npz", **arrays(labels=np.array([object()] * 6)))
    with pytest.raises(ValueError, match=r"val.npz: no npz file of numbers: Object arrays cannot be loaded"):
        clips(tmp_path, "val")
    with pytest.raises(ValueError, match="known: train, val"):
        clips(tmp_path, "test")
    (tmp_path / "train.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.npz and train.h5 both exist"):
        clips(tmp_path, "train")


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"goal-objectives\[hdf5\]"):
        clips(tmp_path, "train")


@pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="needs h5py")
def test_what_is_no_hdf5_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.h5").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train.h5: no HDF5 file"):
        clips(tmp_path, "train")


# ── training ────────────────────────────────────────────────────────────────────────────────────────────

CLASSES, CLIPS = 6, 90


def labelled(folder: Path) -> Clips:
    """Emoji as clips: the nearest of six of them is the class, captions stand in for sounds."""
    pairs = goal.data.load("emoji", "train")
    assert pairs.y is not None
    x = torch.from_numpy(pairs.x)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    centres = x[torch.arange(CLASSES) * 150]
    similarity, nearest = (x @ centres.T).max(1)
    chosen = similarity.topk(CLIPS).indices
    np.savez(
        folder / "train.npz",
        audio=pairs.y.reshape(len(x), 5, -1).mean(1)[chosen],
        visual=x[chosen].numpy(),
        labels=nearest[chosen].numpy(),
    )
    return clips(folder, "train")


def map_both_ways(model: AudioVisual, audio: torch.Tensor, visual: torch.Tensor, labels: torch.Tensor) -> list[float]:
    with torch.no_grad():
        x, y = model(audio, visual)
    found = goal.map_at_all(x, y, labels, labels)
    return [found.x2y, found.y2x]


@pytest.mark.parametrize("mining", ["semi-hard", "hardest"])
def test_heads_learn_classes_from_clips(tmp_path: Path, mining: str) -> None:
    torch.manual_seed(0)
    read = labelled(tmp_path)
    audio, visual, labels = (torch.from_numpy(each) for each in (read.audio, read.visual, read.labels))
    assert len(labels.unique()) >= 3
    model = AudioVisual(d_audio=384, d_visual=1280, hidden=64, dim=16)
    before = map_both_ways(model, audio, visual, labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        x, y = model(audio, visual)
        assert x.norm(dim=1).allclose(torch.ones(CLIPS))
        loss = goal.apply(x, y, T="nca", P="con", mining=mining, ids=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for first, last in zip(before, map_both_ways(model, audio, visual, labels), strict=True):
        assert last > first + 15  # percent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_heads_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AudioVisual(4, 5, hidden=7, dim=3).to(dtype)
    audio, visual = torch.randn(6, 4), torch.randn(2, 5)
    x, y = model(audio, visual)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for v, head, e in ((audio, model.audio, x), (visual, model.visual, y)):
        first, _, _, second = head.layers
        hidden = (v.double() @ first.weight.double().T + first.bias.double()).clamp(min=0)
        out = hidden @ second.weight.double().T + second.bias.double()
        expected = out / out.square().sum(1, keepdim=True).sqrt()
        assert (e - expected).abs().max() < {torch.bfloat16: 0.03, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
