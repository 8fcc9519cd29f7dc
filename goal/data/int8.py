"""Feature rows stored as int8, with a float scale for each row."""

import numpy as np
from numpy.typing import NDArray


def quantise(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 rows and one scale per row: q = round(row / scale), scale = max |row| / 127.

    Args:
        rows: (N, D) float32, finite.

    Returns:
        (N, D) int8 and (N,) float32; a row of zeros has scale 0.

    >>> quantise(np.array([[0.0, 1.0, -2.0]], np.float32))[0]
    array([[   0,   64, -127]], dtype=int8)
    """
    scale = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))
    return np.rint(rows / divisor[:, None]).astype(np.int8), scale


def dequantise(rows: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The (N, D) float32 rows that int8 rows and their scales stand for: row · scale.

    >>> dequantise(np.array([[0, 64, -127]], np.int8), np.array([0.5], np.float32))
    array([[  0. ,  32. , -63.5]], dtype=float32)
    """
    return rows.astype(np.float32) * scale[:, None]
