"""In which languages a text is written: by script, and among seven languages in Latin script by their stop words.

A script counts where it makes up at least a tenth of the letters, and at least three of them; one Han, Kana or Hangul
character counts as two letters. Code blocks and `code` are left out. Of Latin text, a language counts whose stop words
make up the most, at least three and at least a tenth of the words; where two are equally many or too few are found, the
text is just `latin`. Cost: linear in the text.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

_SCRIPTS = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)), "greek": ((0x370, 0x3FF),), "cyrillic": ((0x400, 0x52F),),
    "hebrew": ((0x590, 0x5FF),), "arabic": ((0x600, 0x6FF), (0x750, 0x77F)), "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),), "kana": ((0x3040, 0x30FF),), "hangul": ((0x1100, 0x11FF), (0xAC00, 0xD7AF)),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
}  # fmt: skip
"""Code points of each script, both ends included."""
_WHOLE_WORDS = ("kana", "hangul", "han")
_STOP_WORDS = {
    "en": (
        "the of and to is that it was for on are with as they at be this have from or had by but what were when "
        "your which"
    ),
    "de": (
        "der die und das ist nicht ein eine zu den mit von auf für im dem sich des auch es an werden aus er hat "
        "dass sie wird"
    ),
    "fr": (
        "le la les des et est une pour dans qui que sur pas au avec ce il sont plus par se ne elle ont cette "
        "mais nous vous"
    ),
    "es": (
        "el los las y es una por con para del se su al lo como más pero sus le ya o este sí porque esta entre "
        "cuando muy"
    ),
    "it": "il di che e la un per una in non sono con del si come ma gli della al le dei nel anche più questo ha alla",
    "pt": (
        "o os as e um uma para com não que do da em por mais dos como mas foi ao ele das à seu sua ou quando "
        "muito nos já"
    ),
    "nl": "de het een en van ik te dat die in je is niet op aan met voor er maar om zijn hij ook als dan bij nog uit",
}
_WORD_SETS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FEWEST = 3
_LEAST_SHARE = 0.1


def languages_of(text: str) -> frozenset[str]:
    """Return scripts of a text, Latin by language where that shows.

    >>> sorted(languages_of("The answer is that it was there."))
    ['en']
    >>> sorted(languages_of("The answer is in this: 答案是四十二"))
    ['en', 'han']
    """
    prose = _CODE.sub(" ", text)
    letters: Counter[str] = Counter()
    for character, count in Counter(prose).items():
        script = _script_of(character)
        if script is not None:
            letters[script] += count * (2 if script in _WHOLE_WORDS else 1)
    total = sum(letters.values())
    found = {name for name, count in letters.items() if count >= _FEWEST and count >= _LEAST_SHARE * total}
    if "latin" in found:
        language = _latin_language(prose)
        found = found - {"latin"} | {language} if language else found
    return frozenset(found)


def has_switched(answer: str, expected: frozenset[str]) -> bool:
    """Tell whether an answer uses a language that is not among those expected.

    Latin text in no certain language is taken for any Latin language, on either side.
    """
    latin = {"latin", *_WORD_SETS}
    for language in languages_of(answer):
        if (
            language in expected
            or (language == "latin" and expected & latin)
            or (language in latin and "latin" in expected)
        ):
            continue
        if expected:
            return True
    return False


def _latin_language(text: str) -> str | None:
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    counts = Counter({name: sum(words[word] for word in stop_words) for name, stop_words in _WORD_SETS.items()})
    (first, most), (_, second) = counts.most_common(2)
    return first if most > second and most >= _FEWEST and most >= _LEAST_SHARE * words.total() else None


@cache
def _script_of(character: str) -> str | None:
    code = ord(character)
    return next((name for name, ranges in _SCRIPTS.items() if any(low <= code <= high for low, high in ranges)), None)
