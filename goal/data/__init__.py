"""Pairs as features: the built-in `emoji`, the field's folders, your own files; labelled audio-visual clips."""

from goal.data.audio_visual import Clips, clips
from goal.data.pairs import Pairs, emoji, load, paired, paired_folder, precomp

__all__ = ["Clips", "Pairs", "clips", "emoji", "load", "paired", "paired_folder", "precomp"]
