"""Captions: the vocabulary of the training split, and encoders of words and of token features."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from goal import validation
from goal.data import Pairs
from goal.data.files import check_file, write_atomically
from goal.models import sets
from goal.models.image import linear
from goal.models.pooling import GPO
from goal.models.words import normal_form, words_of

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>", "<mask>")  # their places are their tokens
PAD, START, END, UNKNOWN, MASK = range(len(SPECIAL))
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LONGEST = 2000  # words of a caption; 128 captions padded to as many, as 1024 float32 each, are 1 GB
WORDLESS = 0.1  # of the captions: from there on a warning


class Vocabulary:
    """The words of the training captions, most frequent first, after five special tokens.

    A caption's words are those of its normal form, see `goal.models.words.words_of`: one for any case, width and way to
    write accents; characters where a script has no spaces. It becomes ``<start> words <end>``, with ``<unk>`` for words
    that are not here; ``<mask>`` is what training puts over words.

    Args:
        words: different words, without the special ones; their order is their token's.

    Raises:
        ValueError: a word twice, or a special one.
        TypeError: something that is no text.

    Example:
        >>> from goal.models import Vocabulary
        >>> vocabulary = Vocabulary.of(["A dog runs.", "a dog", "The cat"], min_count=2)
        >>> vocabulary.words, len(vocabulary)
        (('a', 'dog'), 7)
        >>> vocabulary.encode(["A black dog", "Dog!"])
        (tensor([[1, 5, 3, 6, 2],
                [1, 6, 2, 0, 0]]), tensor([5, 3]))
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        for word in self.words:
            if not isinstance(word, str):
                raise TypeError(f"words must be texts, got {word!r}.")
        self._token = {word: token for token, word in enumerate((*SPECIAL, *self.words))}
        if len(self._token) < len(self):
            twice = next(word for word, count in Counter((*SPECIAL, *self.words)).items() if count > 1)
            raise ValueError(f"words: {twice!r} is there twice, or one of the special {', '.join(SPECIAL)}.")
        for word in self.words:
            self._token.setdefault(normal_form(word), self._token[word])

    def __len__(self) -> int:
        """How many tokens there are, the special ones included: what `GRUText` takes as `tokens`."""
        return len(SPECIAL) + len(self.words)

    @classmethod
    def of(cls, training: Pairs | Iterable[str], min_count: int = 4) -> Self:
        """The words that occur at least `min_count` times in the training captions; equal counts alphabetically,
        an apostrophe after all letters.

        Args:
            training: captions, or the `goal.data.Pairs` of the training split.
            min_count: 4 in the published systems.

        Raises:
            ValueError: another split than "train", `Pairs` without texts, or no word that occurs so often.
            TypeError: one text in place of many, or a min_count that is no whole number.

        Warns:
            UserWarning: most of the training captions' words are rarer, and so unknown.

        >>> import goal
        >>> len(Vocabulary.of(goal.data.load("emoji", "train")))
        710
        """
        min_count = validation.whole_number("min_count", min_count, least=0)
        if isinstance(training, Pairs):
            if training.split != "train":
                raise ValueError(
                    f"training: a vocabulary is made from the split 'train' alone, got {training.split!r}."
                )
            if training.captions is None:
                raise ValueError(f"training: the captions of {training.name!r} are only features.")
            training = training.captions
        texts = list(_texts("training", training))
        counts = Counter(word for caption in texts for word in words_of(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        if not kept:
            raise ValueError(
                f"training: no word occurs {min_count} times (min_count) in {len(texts)} captions, which have "
                f"{len(counts)} different words; give more captions, or a smaller min_count."
            )
        known, words = sum(counts[word] for word in kept), counts.total()
        if 2 * known < words:
            warnings.warn(
                f"training: most words are unknown: of {words} in {len(texts)} captions {words - known} occur fewer "
                f"than {min_count} times (min_count), and the vocabulary has {len(kept)} of {len(counts)}.",
                stacklevel=2,
            )
        return cls(sorted(kept, key=lambda word: (-counts[word], word.replace("'", "’"))))

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to tokens (B, L) int64, 0 after each one's end, and lengths (B,) int64, ends included; on the CPU.

        Raises:
            ValueError: no caption at all, or one of more than 2000 words.
            TypeError: one text in place of many, or something that is no text.

        Warns:
            UserWarning: most words are unknown, or many captions have none.
        """
        tokens, lengths = self.flat(captions)
        return padded(tokens, lengths.cumsum(0) - lengths, lengths), lengths

    def flat(self, captions: Sequence[str], name: str = "captions") -> tuple[Tensor, Tensor]:
        """Captions to their tokens one after another, (ΣL,) int64, and lengths (B,) int64; as `encode`, not padded.

        Args:
            captions: any number.
            name: what errors and warnings call them.

        >>> Vocabulary(["a", "dog"]).flat(["A dog", "dog"])
        (tensor([1, 5, 6, 2, 1, 6, 2]), tensor([4, 3]))
        """
        tokens: list[int] = []
        lengths: list[int] = []
        unknown: list[str] = []
        for row, caption in enumerate(_texts(name, captions)):
            words = words_of(caption)
            if len(words) > LONGEST:
                raise ValueError(f"{name}: row {row} has {len(words)} words, a caption may have {LONGEST}.")
            tokens += (START, *(self._token.get(word, UNKNOWN) for word in words), END)
            lengths.append(len(words) + 2)
            unknown += (word for word in words if word not in self._token)
        if not lengths:
            raise ValueError(f"{name} must not be empty.")
        n_words, wordless = len(tokens) - 2 * len(lengths), lengths.count(2)
        if 2 * len(unknown) > n_words:
            warnings.warn(
                f"{name}: most words are unknown: {len(unknown)} of {n_words} are not among the {len(self.words)} of "
                f"the vocabulary, such as {unknown[0]!r}; is it of other captions, or another language?",
                stacklevel=2,
            )
        if wordless > WORDLESS * len(lengths):
            example = f"such as row {lengths.index(2)}"
            warnings.warn(f"{name}: {wordless} of {len(lengths)} have no word, {example}.", stacklevel=2)
        return torch.tensor(tokens, device="cpu"), torch.tensor(lengths, device="cpu")

    def save(self, path: str | Path) -> None:
        """Write the words as JSON, whole or not at all."""
        write_atomically(Path(path), (json.dumps({"words": self.words}, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            ValueError: naming the file: none there, or no vocabulary in it.

        Warns:
            UserWarning: words that no caption has, since captions were cut into words in another way.
        """
        path = check_file(Path(path))
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict) or not isinstance(found.get("words"), list):
                raise ValueError('must be {"words": [...]}')
            vocabulary = cls(found["words"])
        except (ValueError, TypeError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise ValueError(f"{path}: no vocabulary: {error}") from error
        lost = [word for word in vocabulary.words if words_of(word) != [normal_form(word)]]
        if lost:
            warnings.warn(
                f"{path}: {len(lost)} of {len(vocabulary.words)} words are in no caption, such as {lost[0]!r}: they "
                "were made by another rule; what was trained with them should be trained again.",
                stacklevel=2,
            )
        return vocabulary


def padded(tokens: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    """Runs of tokens, the b-th of lengths[b] from first[b] on, to (B, L), <pad> after each one's end.

    >>> padded(torch.tensor([1, 5, 6, 2, 1, 6, 2]), torch.tensor([0, 4]), torch.tensor([4, 3]))
    tensor([[1, 5, 6, 2],
            [1, 6, 2, 0]])
    """
    places = torch.arange(int(lengths.max()), device=tokens.device)
    real = places < lengths[:, None]  # (B, L)
    return tokens[(first[:, None] + places) * real].masked_fill(~real, PAD)


def _texts(name: str, given: object) -> Iterable[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be several texts, got {type(given).__name__}.")
    for row, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be texts, got {text!r} at position {row}.")
        yield text


class WordStates(nn.Module):
    """A state for each word: word embedding, then a GRU, or a BiGRU averaged over its directions.

    Args:
        tokens: how many there are, `len(vocabulary)`.
        dim: of the states.
        d_word: of the word embedding.
        both: a BiGRU.
        masking: share of the words, <start> and <end> excepted, that become <mask> in training.

    Example:
        >>> import torch
        >>> from goal.models import Vocabulary, WordStates
        >>> vocabulary = Vocabulary.of(["a dog", "a cat runs"], min_count=1)
        >>> WordStates(len(vocabulary), dim=16)(*vocabulary.encode(["a cat", "dog"])).shape
        torch.Size([2, 4, 16])

    Source: Lee et al., SCAN, ECCV 2018, §3.2.
    """

    def __init__(
        self, tokens: int, dim: int = 1024, d_word: int = 300, both: bool = True, masking: float = 0.0
    ) -> None:
        super().__init__()
        dim, d_word = validation.whole_number("dim", dim), validation.whole_number("d_word", d_word)
        tokens = validation.whole_number("tokens", tokens)
        if tokens < len(SPECIAL):
            raise ValueError(f"tokens must be len(vocabulary), at least the {len(SPECIAL)} special ones, got {tokens}.")
        self.tokens, self.masking = tokens, sets.share("masking", masking)
        self.embedding = nn.Embedding(tokens, d_word)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.gru = nn.GRU(d_word, dim, batch_first=True, bidirectional=both)

    def forward(self, values: Tensor, lengths: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Tokens (B, L), the first lengths[b] of each real (None: all are), to (B, L, dim); 0 where padded.

        Args:
            values: integers; what is padded may hold anything.
            lengths: (B,) integers in 1 … L.
            generator: what decides in training which words are masked; by default torch's own.

        Raises:
            TypeError, ValueError: for another shape or dtype, or a token or length out of range.
        """
        if not isinstance(values, Tensor) or values.dtype not in INTEGERS:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a tensor of integer tokens, got {got}.")
        if values.dim() != 2 or values.numel() == 0:
            raise ValueError(f"values must have shape (B, L), not empty, got {tuple(values.shape)}.")
        mask = sets.mask_of("lengths", lengths, values)
        values = values.long().masked_fill(~mask, PAD)
        low, high = (int(end) for end in values.aminmax())
        if low < 0 or high >= self.tokens:
            wrong = low if low < 0 else high
            raise ValueError(f"values must be tokens 0 … {self.tokens - 1}, got {wrong}: of another vocabulary?")
        if self.training and self.masking:
            values = values.masked_fill(sets.drawn(mask & (values > END), self.masking, generator), MASK)
        packed = pack_padded_sequence(self.embedding(values), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=values.shape[1])
        return states.unflatten(2, (2, -1)).mean(2) if self.gru.bidirectional else states


class GRUText(nn.Module):
    """Words to one vector: the last state of a GRU (VSE++), or a BiGRU's states pooled by the GPO (VSE∞).

    Args:
        tokens, dim, d_word, masking: as for `WordStates`.
        pooling: `last` or `gpo`.

    Raises:
        ValueError: unknown pooling, too few tokens, a share outside [0, 1).

    Example:
        >>> import torch
        >>> from goal.models import GRUText, Vocabulary
        >>> vocabulary = Vocabulary.of(["a dog", "a cat runs"], min_count=1)
        >>> GRUText(len(vocabulary), dim=16, pooling="gpo")(*vocabulary.encode(["a cat", "dog"])).shape
        torch.Size([2, 16])

    Source: Faghri et al., VSE++, BMVC 2018, §3; Chen et al., CVPR 2021, §3.
    """

    def __init__(
        self, tokens: int, dim: int = 1024, d_word: int = 300, pooling: str = "last", masking: float = 0.0
    ) -> None:
        super().__init__()
        if pooling not in ("last", "gpo"):
            raise ValueError(f"pooling must be 'last' (VSE++) or 'gpo' (VSE∞), got {pooling!r}.")
        self.states = WordStates(tokens, dim, d_word, both=pooling == "gpo", masking=masking)
        self.pool = GPO() if pooling == "gpo" else None

    def forward(self, values: Tensor, lengths: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Tokens (B, L), lengths (B,) to (B, dim); see `WordStates`."""
        states: Tensor = self.states(values, lengths, generator)
        mask = sets.mask_of("lengths", lengths, values)
        if self.pool is not None:
            pooled: Tensor = self.pool(states, mask)
            return pooled
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


class TokenText(nn.Module):
    """Precomputed token features of a transformer to one vector: a linear layer, then the GPO.

    Args:
        d_in: dimensions of a token's features; 768 of BERT-base.
        dim: of the joint space.
        drop: share of the tokens left out in training.

    Example:
        >>> import torch
        >>> from goal.models import TokenText
        >>> TokenText(768, dim=64)(torch.randn(2, 12, 768), torch.tensor([12, 7])).shape
        torch.Size([2, 64])

    Source: Chen et al., CVPR 2021, §3, whose BERT is trained along; here its features are given.
    """

    def __init__(self, d_in: int = 768, dim: int = 1024, drop: float = 0.2) -> None:
        super().__init__()
        self.fc = linear(d_in, dim)
        self.d_in, self.drop = self.fc.in_features, sets.share("drop", drop)
        self.pool = GPO()

    def forward(self, values: Tensor, lengths: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Features (B, L, d_in), lengths (B,) to (B, dim); the arguments and errors of `RegionImage`."""
        values = sets.features("values", values, "(B, L, D)", self.d_in)
        mask = sets.mask_of("lengths", lengths, values)
        if self.training and self.drop:
            mask = sets.thinned(mask, self.drop, generator)
        f = self.fc(sets.pack(values, mask).to(self.fc.weight.dtype))
        pooled: Tensor = self.pool(sets.unpack(f, mask), mask)
        return pooled
