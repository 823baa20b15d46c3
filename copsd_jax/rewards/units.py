"""Numbers with units, currencies, counted nouns and scale words, in the languages of `units.json`.

`units.json` has one entry for each language, kind and meaning. The entry lists all words with this
meaning. The kinds are:

    unit, currency   words that an answer may omit
    scale            words that multiply the number (thousand, lakh, 万)
    value            words that change the number in another way (half, squared)
    power            words for an exponent of the unit (square, cubic)
    join             words that connect the parts of an answer (and, or)

The field `checked` tells whether a speaker of the language has checked the entry. So far, no entry
has been checked. Entries of the language `und` are international symbols.
"""

import collections
import dataclasses
import fractions
import functools
import itertools
import json
import pathlib
import re
import unicodedata

from copsd_jax.rewards import numerals

POLICIES = ("words", "listed", "same")

_GROUP = r"(?:\d[\d.,'’]*(?:\ \d{3}(?!\d)[\d.,]*)*|\.\d+)"
_FRAC = r"\\frac\ ?\{\ ?\d[\d.,]*\ ?\}\ ?\{\ ?\d[\d.,]*\ ?\}"
_NUMERAL = re.compile(
    rf"""(?:[+-]\ ?)?(?:{_GROUP}?\ ?{_FRAC}|\d+\ \d+\ ?/\ ?\d+|{_GROUP}\ ?/\ ?\d[\d.,]*
    |{_GROUP}(?:\ ?(?:\\times|\\cdot|\*|x)\ ?10\ ?\^\ ?(?:\{{\ ?[+-]?\d+\ ?\}}|\d+)
    |[eE][+-]?\d+(?!\w))?)""",
    re.VERBOSE,
)
_TRAILING_UNIT = re.compile(
    r"(?P<body>.*[\d\\)}\]].*?) (?P<unit>[^\d\\\s(){}=<>]{2,20}(?:\^ ?\{?[23]\}?)?)$"
)
_VARIABLES = re.compile("[a-df-hj-np-tv-z]{1,3}", re.IGNORECASE)  # letters that rarely form a word
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "THAI", "LAO", "VAI")
_ARABIC_MARKS = re.compile("[\u064b-\u0652\u0670]")
_LONGEST_PHRASE = 3  # maximum number of words in a phrase
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp lim max mod gcd lcm det arcsin arccos arctan".split()
)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number, with the units, scales and other words before and after the number.

    Attributes:
      number: the numeral in folded spelling.
      scale: the product of the scale words, such as 1000 for "8 thousand".
      units: the possible meanings of the listed unit; empty if no listed unit is present.
      words: the words that are no unit, scale or power, in folded spelling.
    """

    number: str
    scale: fractions.Fraction = fractions.Fraction(1)
    units: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()

    def compute_value(self, comma: bool) -> fractions.Fraction | None:
        """Returns the exact value; if `comma` is true, "3,5" is read as 3.5."""
        number = numerals.parse_number(self.number, comma)
        value = fractions.Fraction(number) if number else numerals.parse_exact(self.number)
        return None if value is None else value * self.scale


@functools.cache
def _load_words() -> dict[str, dict[str, set[str]]]:
    """Loads the meanings of each word by kind; lists each word as written and as folded."""
    table: dict[str, dict[str, set[str]]] = {}
    text = pathlib.Path(__file__).with_name("units.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        for word in entry["words"]:
            for key in {word, _fold_word(word)} if len(word) > 1 else {word}:
                kinds = table.setdefault(key, collections.defaultdict(set))
                kinds[entry["kind"]].add(entry["meaning"])
    return table


def _fold_word(word: str) -> str:
    return _ARABIC_MARKS.sub("", word).casefold().replace("’", "'").replace("ʼ", "'")


def _look_up(word: str) -> dict[str, set[str]]:
    table = _load_words()
    if word in table:
        return table[word]
    return table.get(_fold_word(word), {}) if len(word) > 1 else {}


@functools.cache
def list_joins() -> tuple[str, ...]:
    """Returns the words for "and" and "or", longest first."""
    joins = {word for word, kinds in _load_words().items() if "join" in kinds}
    return tuple(sorted(joins, key=len, reverse=True))


def read_quantity(text: str, policy: str = "words") -> Quantity | None:
    """Reads a folded text that is one number with words beside it; returns None for other texts.

    Args:
      text: the folded text.
      policy: `listed` refuses words that `units.json` does not list.
    """
    if len(text) > numerals.LONGEST:
        return None
    match = _NUMERAL.search(text)
    if match is None:
        return None
    number, before, after = match[0], text[: match.start()], text[match.end() :]
    kept = number.rstrip(".,'’ ")
    after = number[len(kept) :] + after
    number = kept
    sign = re.match(r"\s*([+-])\s*", before)
    if sign and not number.startswith(("+", "-")):
        number, before = sign[1] + number, before[sign.end() :]
    elif number.startswith("-") and before[-1:].isalpha() and before[-2:-1].isalpha():
        number = number[1:]  # the hyphen of "ezi-26"
        before += " "
    number = number.replace("- ", "-").replace("+ ", "+").strip()
    front, back = _read_words(before, True, policy), _read_words(after, False, policy)
    if front is None or back is None:
        return None
    units = front.units & back.units or back.units or front.units
    scale = front.scale * back.scale
    quantity = Quantity(number, scale, units, front.words | back.words)
    return None if quantity.compute_value(comma=True) is None else quantity


def _read_words(text: str, before: bool, policy: str) -> Quantity | None:
    """Reads the words on one side of a number; returns None if a word is no unit, scale or noun."""
    spaced = text[-1:].isspace() if before else text[:1].isspace()
    text = re.sub(r"\^ ?\{? ?([23]) ?\}?", lambda m: "²" if m[1] == "2" else "³", text)
    if not before:
        text = re.sub(r"\(([^()]*)\)", r" \1 ", text)  # 26 (books)
    text = re.sub(r"\s*/\s*|\s+per\s+", "/", re.sub("[,;:]", " ", text))
    tokens = [piece for token in text.split() for piece in _split_unspaced(token)]
    if not all(map(_is_word, tokens)):
        return None
    attached = not spaced and bool(tokens) and tokens[-1 if before else 0]
    scale, power, units, words = fractions.Fraction(1), 0, set(), set()
    at = 0
    while at < len(tokens):
        size, kinds = _match_phrase(tokens, at)
        word = " ".join(tokens[at : at + size])
        at += size
        if "value" in kinds or _fold_word(word) in _FUNCTIONS:
            return None
        if "scale" in kinds:
            if not before and (units or words):
                return None
            scale *= fractions.Fraction(min(kinds["scale"], key=int))
        elif "power" in kinds:
            power = int(min(kinds["power"]))
        elif found := _find_units(word, kinds, before, alone=len(tokens) == size):
            units |= found if not units else set()
        elif policy == "listed" or (word == attached and word.isascii()):
            return None
        else:
            words.add(_fold_word(word))
    if words and not units and scale == 1 and not _look_like_nouns(words):
        return None
    if power and units:
        units = {f"{unit}^{power}" for unit in units}
    return Quantity("", scale, frozenset(units), frozenset(words))


def _is_word(token: str) -> bool:
    return all(unicodedata.category(c)[0] in "LM" or c in "'’ʼ‘.-·²³/°%\uff04¢″" or
               unicodedata.category(c) == "Sc" for c in token)  # fmt: skip


def _match_phrase(tokens: list[str], at: int) -> tuple[int, dict[str, set[str]]]:
    """Returns the number of tokens of the longest listed phrase at `at`, and its meanings."""
    for size in range(min(_LONGEST_PHRASE, len(tokens) - at), 0, -1):
        kinds = _look_up(" ".join(tokens[at : at + size]))
        if kinds and kinds.keys() != {"join"}:
            return size, kinds
    return 1, {}


def _find_units(word: str, kinds: dict[str, set[str]], before: bool, alone: bool) -> set[str]:
    """Returns the possible meanings of a word as a unit; also reads composite units like km/h."""
    parts = word.split("/")
    if len(parts) > 1:
        options = [_find_units(p, _look_up(p), before, alone) if p else set() for p in parts]
        if not all(options):
            return set()
        return {"/".join(min(found) for found in options)}
    if word[-1:] in "²³" and (base := _look_up(word[:-1]).get("unit")):
        return {f"{unit}^{2 if word[-1] == '²' else 3}" for unit in base}
    units, currencies = kinds.get("unit", set()), kinds.get("currency", set())
    if len(word) == 1 and word.isascii() and word.isalpha():
        return currencies if before else units
    if len(word) <= 2 and word.isascii() and word.isalpha() and not alone:
        return currencies  # the "in" of "26 in total" does not mean inches
    return units | currencies


def _split_unspaced(token: str) -> list[str]:
    """Splits a token of a script without blanks into listed words and the remaining text."""
    pieces, table = [], _load_words()
    while token and _is_unspaced(token[0]):
        size = next((n for n in range(min(12, len(token)), 0, -1) if token[:n] in table), 0)
        if not size:
            break
        pieces.append(token[:size])
        token = token[size:]
    return [*pieces, token] if token else pieces


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").split(" ")[0] in _UNSPACED


def _look_like_nouns(words: set[str]) -> bool:
    """Tells whether unlisted words may be counted nouns instead of variables."""
    return any(_is_spelt(word) for word in words)


def _is_spelt(word: str) -> bool:
    """Tells whether a word is more than a row of letters such as xyz, abcd or uv."""
    if not word.isascii():
        return len(word) > 1 or _is_unspaced(word)
    if _VARIABLES.fullmatch(word):
        return False
    letters = word.strip("'.-")
    run = all(ord(b) - ord(a) == 1 for a, b in itertools.pairwise(letters))
    return not run and any(c in "aeiouy" for c in letters) and len(letters) > 2


def split_unit(text: str) -> tuple[str, frozenset[str]]:
    """Splits a listed unit from the end of a folded formula; returns (formula, meanings)."""
    if len(text) <= numerals.LONGEST:
        text = text.strip()
        if text.endswith(("°", "%")) and len(text) > 1 and text.count(text[-1]) == 1:
            return text[:-1].strip(), frozenset({"degree" if text[-1] == "°" else "percent"})
        match = _TRAILING_UNIT.fullmatch(text)
        found = match and _read_words(" " + match["unit"], False, "listed")
        if match and found and found.units and found.scale == 1:
            return match["body"], found.units
    return text, frozenset()


def agree(gold: Quantity, answer: Quantity, policy: str) -> bool:
    """Tells whether the units and nouns of two quantities agree.

    If one side states neither a unit nor a noun, the policy decides. If at least one side states a
    listed unit, the units of both sides must have a meaning in common. If neither side states a
    listed unit, the words of one side must include all words of the other side.
    """
    stated = [bool(side.units or side.words) for side in (gold, answer)]
    if not all(stated):
        return policy != "same" or not any(stated)
    if gold.units or answer.units:
        return bool(gold.units & answer.units)
    left, right = ({_stem(word) for word in side.words} for side in (gold, answer))
    return left <= right or right <= left


def _stem(word: str) -> str:
    return word.removesuffix("s").removesuffix("e") if word.isascii() and len(word) > 3 else word
