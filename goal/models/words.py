"""The words of a caption in any script: a normal form, letters with their marks, scripts without spaces."""

import re
import unicodedata
from collections.abc import Callable

ASCII_WORD = re.compile(r"\w+(?:'\w+)*")
# as ASCII_WORD, of kinds of characters (see `_kind`) in place of characters; then one unspaced character with its marks
UNIT = re.compile(r"w[wm]*(?:'w[wm]*)*|[cs](?:m|\+s?)*")

APOSTROPHES = "'׳״·"  # inside a word they are a part of it; Hebrew's geresh and gershayim, Catalan's dot in l·l
IDEOGRAPHS = ("CJK", "IDEOGRAPHIC", "VERTICAL IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "VERTICAL KANA", "BOPOMOFO")
UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW TAI", "BALINESE", "JAVANESE")  # how their names begin
TRAILING = "\u0e33\u0eb3"  # Thai's and Lao's AM: letters by their category, but a part of the syllable before
STACKERS = "\u17d2\u1039\u1a60\u1b44\ua9c0"  # signs that put the next consonant under this one
QUOTE = "’"  # how many programs write the apostrophe
LETTER_APOSTROPHE = re.compile(r"(?<=[\w\u0300-\u036f])\u02bc(?=\w)")  # at an end it is a letter of its own
DOT_ON_I = re.compile("i\u0307")  # what lower-casing Turkish İ leaves; i has its dot already

SHAPES = ("<wide>", "<narrow>", "<font>", "<initial>", "<medial>", "<final>", "<isolated>")
ZERO_WIDTH_SPACE, GRAPHEME_JOINER, TATWEEL = "\u200b", "\u034f", "\u0640"


def words_of(caption: str) -> list[str]:
    """The words of a caption, in its normal form.

    A word is a run of letters, digits and _, with the marks on them and apostrophes inside. In scripts that are written
    without spaces it is a character (Chinese, Japanese), or a letter with its marks (Thai, Lao, Khmer, Burmese, …).

    >>> words_of("Don’t stop: 2 x-rays!")
    ["don't", 'stop', '2', 'x', 'rays']
    >>> words_of("Ein MA\u0308DCHEN, iPhone手机")
    ['ein', 'mädchen', 'iphone', '手', '机']
    """
    if caption.isascii():
        return ASCII_WORD.findall(caption.lower())
    text = normal_form(caption)
    return [text[unit.start() : unit.end()] for unit in UNIT.finditer(text.translate(_KINDS))]


def normal_form(text: str) -> str:
    """What is equal to a reader made equal to a program.

    Case is folded (ß is ss, İ is i); letters of another width or shape are the plain ones; accents are composed (NFC);
    the apostrophe is ' in every form that it has inside a word; what is not seen (byte order marks, soft hyphens,
    joiners, variation selectors) is taken away. Languages' own rules, such as Turkish I for ı, are not applied.

    >>> normal_form("Ｓtraße"), normal_form("u\u0308ber"), normal_form("İstan\u00adbul")
    ('strasse', 'über', 'istanbul')
    """
    folded = unicodedata.normalize("NFD", text.translate(_PLAIN)).casefold()
    return LETTER_APOSTROPHE.sub("'", unicodedata.normalize("NFC", DOT_ON_I.sub("i", folded)))


class _Table(dict[int, str]):
    """For `str.translate`: what a function gives for a character, kept from its first use on."""

    def __init__(self, of: Callable[[str], str]) -> None:
        self.of = of

    def __missing__(self, code: int) -> str:
        value = self[code] = self.of(chr(code))
        return value


def _plain(character: str) -> str:
    """A character without its width and shape; nothing for one that is not seen."""
    if character == ZERO_WIDTH_SPACE:
        return " "
    if character == QUOTE:
        return "'"
    unseen = unicodedata.category(character) in ("Cf", "Me") or character in (GRAPHEME_JOINER, TATWEEL)
    if unseen or "VARIATION SELECTOR" in unicodedata.name(character, ""):
        return ""
    shaped = unicodedata.decomposition(character).startswith(SHAPES)
    return unicodedata.normalize("NFKC", character).replace(TATWEEL, "") if shaped else character


def _kind(character: str) -> str:
    """w: of a word, c: ideograph or kana, s: of an unspaced syllable, m: mark, +: a mark that stacks, ', or a space."""
    name = unicodedata.name(character, "")
    if character in APOSTROPHES:
        return "'"
    if character in STACKERS:
        return "+"
    if unicodedata.category(character) in ("Mn", "Mc") or character in TRAILING:
        return "m"
    if not (character.isalnum() or character == "_"):
        return " "
    if character.isdecimal():
        return "w"
    if name.startswith(IDEOGRAPHS):
        return "c"
    return "s" if name.startswith(UNSPACED) else "w"


_PLAIN, _KINDS = _Table(_plain), _Table(_kind)
