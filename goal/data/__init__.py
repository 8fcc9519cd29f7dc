"""Images and their captions as features: the built-in `emoji`, the field's folders, your own files."""

from goal.data.pairs import Pairs, emoji, load, paired, paired_folder, precomp

__all__ = ["Pairs", "emoji", "load", "paired", "paired_folder", "precomp"]
