"""Recordings as vectors of fixed size: log-mel energies of the sound between the silences, in ten parts."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from goal.data.networks import in_batches, package

SOUND_PACKAGES = ("numpy", "soundfile", "soxr", "torch", "transformers")
RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
FOURIER = 1024  # samples: a window is padded, so that the lowest bands hold a frequency each
BANDS, LOWEST, HIGHEST = 64, 50, 8000  # from and to, in Hz
PARTS = 10
SILENCE = 1e-4  # a frame's energy below this share of the loudest frame's, −40 dB
FLOOR = 1e-8  # of the loudest band of the loudest frame, −80 dB: what a logarithm still sees


def sound_features(recordings: Sequence[Path]) -> NDArray[np.float32]:
    """(N, 640) features of N recordings, as `summary` makes them."""
    return in_batches("recordings", recordings, lambda paths: torch.stack([summary(read_sound(p)) for p in paths]))


def read_sound(path: Path) -> torch.Tensor:
    """(samples,) float32: the mean of a recording's channels at 16 kHz.

    Raises:
        ValueError: the file is no recording.
    """
    soundfile = package("soundfile")
    try:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: no recording: {error}") from error
    return torch.from_numpy(package("soxr").resample(channels.mean(axis=1), rate, RATE))


def summary(samples: torch.Tensor) -> torch.Tensor:
    """(640,) log-mel energies of a recording: 64 bands × the means over ten equal parts of it, less their mean.

    Silence at both ends is cut off. The mean is taken away because loudness tells who recorded, not what. A recording
    of nothing but silence gives zeros.

    Args:
        samples: (samples,) at 16 kHz.
    """
    energies = trimmed(mel_energies(samples))  # (64, T)
    if energies.max() == 0:
        return samples.new_zeros(BANDS * PARTS)
    logarithms = energies.clamp(min=FLOOR * energies.max()).log10()
    parts = torch.nn.functional.adaptive_avg_pool1d(logarithms, PARTS)  # (64, 10)
    return (parts - parts.mean()).flatten()


def mel_energies(samples: torch.Tensor) -> torch.Tensor:
    """(64, T) energies in bands of equal width on the mel scale, of windows of 25 ms, one every 10 ms."""
    window = torch.hann_window(WINDOW, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(samples, FOURIER, HOP, WINDOW, window, pad_mode="constant", return_complex=True)
    return mel_bands().T @ spectrum.abs().square()


@cache
def mel_bands() -> torch.Tensor:
    """(513, 64) how much of each frequency each band hears: triangles that overlap by halves."""
    filters = package("transformers.audio_utils").mel_filter_bank(
        FOURIER // 2 + 1, BANDS, LOWEST, HIGHEST, RATE, norm=None, mel_scale="htk"
    )
    return torch.from_numpy(filters).float()


def trimmed(energies: torch.Tensor) -> torch.Tensor:
    """Frames (bands, T) from the first to the last that is not silent; all of them, if all are.

    >>> trimmed(torch.tensor([[0.0, 9.0, 0.0, 8.0, 1e-5]]))
    tensor([[9., 0., 8.]])
    """
    loudness = energies.sum(0)  # (T,)
    loud = (loudness >= SILENCE * loudness.max()).nonzero().flatten()
    return energies[:, loud[0] : loud[-1] + 1]
