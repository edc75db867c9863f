"""The text of places' names: what makes two spellings the same, and the tokens they consist of."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

# Apostrophes and the marks that transliterations put in their place: spellings differ in them
# more than people do, so "Sana'a" and "Sanaa" are one spelling. Other punctuation separates words.
_APOSTROPHES = frozenset("'`\u2018\u2019\u201b\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8")


def normalise(spellings: Sequence[str]) -> list[str]:
    """Case-folds, decomposes (NFKD) and strips spellings of accents and punctuation.

    Letters, digits and the vowel signs of Indic scripts stay; accents, Hebrew and Arabic points and
    apostrophes go; all else becomes one space between words. A spelling may come out empty.
    """
    if not spellings:
        return []
    # All spellings at once, a line each: the work is then a few passes of C over one text.
    text = "\n".join([spelling.replace("\n", " ") for spelling in spellings])
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    replacement = np.arange(codes.max(initial=0) + 1, dtype=np.uint32)
    for code in np.flatnonzero(np.bincount(codes)):
        replacement[code] = _replace_character(chr(code))
    codes = replacement[codes]
    codes = codes[codes != 0]
    # Of several spaces the first stays, and none at the start or the end of a line.
    blank = (codes == ord(" ")) | (codes == ord("\n"))
    codes = codes[(codes != ord(" ")) | ~np.concatenate(([True], blank))[:-1]]
    line_end_next = np.concatenate((codes[1:] == ord("\n"), [True]))[: len(codes)]
    codes = codes[(codes != ord(" ")) | ~line_end_next]
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").split("\n")


def _replace_character(character: str) -> int:
    """The code point that stands for a character of decomposed text; 0 to drop it."""
    if character == "\n":
        return ord(character)
    combining = unicodedata.combining(character)
    # 10 to 36: Hebrew and Arabic points; from 200: accents. Between and below lie parts of letters
    # (the virama, the voicing of kana, Thai vowels), without which other words would result.
    if 10 <= combining <= 36 or combining >= 200 or character in _APOSTROPHES:
        return 0
    if character.isalnum() or unicodedata.category(character)[0] == "M":
        return ord(character)
    return 0 if unicodedata.category(character) == "Cf" else ord(" ")


def tokenise(normalised: str, country: str) -> list[str]:
    """The tokens of one normalised spelling: its 3-grams, its words and its country."""
    bounded = f"<{normalised}>"
    grams = [f"gram:{bounded[start : start + 3]}" for start in range(len(bounded) - 2)]
    return [*grams, *(f"word:{word}" for word in normalised.split(" ")), f"country:{country}"]
