"""Oracles: decoding growing prefixes, byte offsets, brute force, cases whose place is known."""

import codecs
import dataclasses
import functools
import itertools
import time
import typing
import unicodedata

import conftest
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from copsd_jax.teaching import token_spans
from copsd_jax.weights import hub, tokenizer

SOME = hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)
YORUBA = "Amina ní ọ̀gẹ̀dẹ̀ mẹ́jọ. Ó ra mẹ́ta sí i. 8 + 3 = 12. Nítorí náà, ó ní méjìlá lónìí."
TEXTS = {
    "yoruba_nfc": unicodedata.normalize("NFC", YORUBA),
    "yoruba_nfd": unicodedata.normalize("NFD", YORUBA),
    "amharic": "አሚና ፰ ብርቱካን አላት። ፫ ተጨማሪ ገዛች። ስለዚህ ፰ + ፫ = ፲፪ ። መልሱ ፲፪ ነው።",
    "vai": "ꕉꕆꕯ ꕞ ꔔꔡ ꘨ ꕴ ꗏ ꕪ ꘣ ꔞ ꖷ ꘨ + ꘣ = ꘡꘢ ꖝ ꕉ ꔬꔻ ꘡꘢ ꕮꕊ",
    "thai": "อามีนามีส้ม 8 ผล ซื้อเพิ่มอีก 3 ผล ดังนั้น 8 + 3 = 12 เพราะฉะนั้น คำตอบคือ 12 น้ำ",
    "bengali": "আমিনার ৮টি আম আছে। সে আরও ৩টি কিনল মোট। তাই ৮ + ৩ = ১২। সুতরাং উত্তর হলো ১২ ড়",
    "chinese": "阿米娜有 8 个苹果， 又买了 3 个。 所以 8 + 3 = 12 个， 答案是 12 。",
    "emoji": "👩‍👩‍👧 has 8 🍎 and buys 3 🍎 more 🎉. So 8 + 3 = 12 👍🏽 for 🇰🇪 and 🏴‍☠️ too ☑️!",
    "latex": r"We have $x\,=\,8 + 3$, so $x = 12$ and so \boxed{12}. It $1{,}000~m$ is \frac{1}2.",
}
BLANKS = ("  ", "\n", " \n\t", "\u00a0", "~", r"\,", r" \; ", r"\ ", r"\quad ", "\u3000", "\u200b")


# ---- tokenizers ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    pieces: list[bytes]
    ids: dict[bytes, int]
    specials: dict[str, int]

    def cut(self, text: str, rng: np.random.Generator) -> list[int]:
        """Ids whose bytes are the text's, cut at random: as sampled, not as BPE would."""
        out, data, at = [], text.encode(), 0
        while at < len(data):
            sizes = [n for n in range(1, 13) if data[at : at + n] in self.ids]
            size = rng.choice(sizes, p=np.array(sizes) / sum(sizes))
            out.append(self.ids[data[at : at + size]])
            at += size
        return out


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    path = (
        hub.resolve_model_path("tiny") if name == "tiny" else conftest.SHARED / "tokenizers" / name
    )
    if not path.is_dir():
        pytest.skip(f"needs the development data folder {path}")
    tok = tokenizer.load(path)
    pieces = tokenizer.list_token_bytes(tok)
    added = {token.content: i for i, token in tok.added_tokens_decoder.items()}
    ordinary = {p: i for i, p in enumerate(pieces) if p and i not in added.values()}
    return Vocabulary(pieces, ordinary, added)


def byte_place(ids, vocab, start: int) -> int:
    """The token that holds the first byte of a character of a well-formed text."""
    ends = list(itertools.accumulate(len(vocab.pieces[i]) for i in ids))
    text = b"".join(vocab.pieces[i] for i in ids).decode()
    offset = len(text[:start].encode())
    return next(k for k, end in enumerate(ends) if end > offset)


# ---- cases -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    text: str
    quote: str | None
    start: int
    end: int
    status: str
    occurrence: str = "first"


def passage(text: str, rng: np.random.Generator) -> tuple[str, int]:
    """Three to six words that stand in the text once, and where."""
    words = text.split(" ")
    while True:
        first, count = rng.integers(len(words) - 3), rng.integers(3, 7)
        quote = " ".join(words[first : first + count])
        if text.count(quote) == 1:
            return quote, text.index(quote)


def other_form(quote: str) -> str:
    forms = (unicodedata.normalize(form, quote) for form in ("NFC", "NFD"))
    return next((form for form in forms if form != quote), quote)


def other_blanks(quote: str, rng: np.random.Generator) -> str:
    """Other spacing of the same words; next to a blank, none is as good as one."""
    words = quote.split(" ")
    return "".join(w + rng.choice(BLANKS) for w in words[:-1]) + words[-1]


def variants(language: str, number: int) -> list[Case]:
    rng = np.random.default_rng([number, *language.encode()])
    text = TEXTS[language]
    quote, start = passage(text, rng)
    end = start + len(quote)
    ink = unicodedata.normalize("NFC", quote).replace("{,}", ",").replace("\\,", "")
    ink = len(ink.replace(" ", "").replace("~", ""))
    name = f"{language}-{number}"
    wide = other_blanks(quote, rng)
    out = [
        Case(f"{name}-exact", text, quote, start, end, "exact"),
        Case(f"{name}-padded", text, f"\n {quote}\t ", start, end, "exact"),
        Case(f"{name}-blanks", text, wide, start, end, "normalised"),
        Case(f"{name}-fuzzy", text, quote + "§" * (ink // 4), start, end, "fuzzy"),
        Case(f"{name}-fuzzy-wide", text, "§" * (ink // 4) + wide, start, end, "fuzzy"),
        Case(f"{name}-failed", text, quote + "§" * len(quote), -1, -1, "failed"),
    ]
    if other_form(quote) != quote:
        form = other_form(quote)
        out.append(Case(f"{name}-form", text, form, start, end, "normalised"))
        both = other_blanks(form, rng)
        out.append(Case(f"{name}-both", text, both, start, end, "normalised"))
    return out + repeated(name, text, quote, start, rng) + marked(name, text, quote, start)


def repeated(name, text, quote, start, rng) -> list[Case]:
    """Three copies; each policy, for exact, normalised and fuzzy matches."""
    whole = f"{text}\n{text}\n{text}"
    places = [start + i * (len(text) + 1) for i in range(3)]
    out = []
    spelt = {
        "exact": quote,
        "normalised": other_blanks(quote, rng),
        "fuzzy": quote + "§",
    }
    for status, wanted in spelt.items():
        for policy, start in (("first", places[0]), ("last", places[2])):
            end, label = start + len(quote), f"{name}-{status}-{policy}"
            out.append(Case(label, whole, wanted, start, end, status, policy))
    return out


def marked(name, text, quote, start) -> list[Case]:
    """Special tokens before, inside and behind the quote."""
    prefix, middle = "<think>", "</think>"
    half = len(quote) // 2
    whole = prefix + text[: start + half] + middle + text[start + half :] + "<|im_end|>"
    across = quote[:half] + middle + quote[half:]
    begin = start + len(prefix)
    behind = text[start + len(quote) :] + "<|im_end|>"
    return [
        Case(f"{name}-across", whole, across, begin, begin + len(across), "exact"),
        Case(
            f"{name}-mark", whole, middle, begin + half, begin + half + len(middle), "exact", "last"
        ),
        Case(f"{name}-end", whole, behind, len(whole) - len(behind), len(whole), "exact"),
    ]


def by_hand(name, text, quote, found, status, occurrence="first") -> Case:
    """`found` is the part of the text, which stands there once, or else the span."""
    if isinstance(found, str):
        assert text.count(found) == 1, name
        found = (text.index(found), text.index(found) + len(found))
    start, end = found
    return Case(name, text, quote, start, end, status, occurrence)


NOWHERE = (-1, -1)
HAND_MADE = [
    by_hand("none", "8 + 3 = 12", None, NOWHERE, "no_quote"),
    by_hand("empty", "8 + 3 = 12", "", NOWHERE, "no_quote"),
    by_hand("blank", "8 + 3 = 12", " \n", NOWHERE, "no_quote"),
    by_hand("empty-text", "", "8 + 3 = 12", NOWHERE, "failed"),
    by_hand("only-spacing", "8 + 3 = 12", r"\quad~", NOWHERE, "failed"),
    by_hand("only-spacing-there", r"8\,+\,3", r"\,+", r"\,+", "exact"),
    by_hand("tight", "so 8+3=12.", "8 + 3 = 12", "8+3=12", "normalised"),
    by_hand("loose", "so 8 + 3  = 12.", "8+3=12", "8 + 3  = 12", "normalised"),
    by_hand("digits-apart", "has 8 3 12 of", "8312", NOWHERE, "failed"),
    by_hand("letters-apart", "no where", "nowhere", NOWHERE, "failed"),
    by_hand("digit-letter", "共 12 个苹果", "共12个苹果", "共 12 个苹果", "normalised"),
    by_hand("thousands", r"is 1{,}000 m", "1,000 m", r"1{,}000 m", "normalised"),
    by_hand("thousands-back", "is 1,000 m", r"1{,}000\,m", "1,000 m", "normalised"),
    by_hand("line-break", r"a \\, b", r"a \\ , b", r"a \\, b", "normalised"),
    by_hand("line-break-kept", r"a \\, b", r"a \, b", NOWHERE, "failed"),
    by_hand("command", r"a\quadratic", r"a\quad ratic", NOWHERE, "failed"),
    by_hand("quad", r"x = 1\quad y = 2", "x=1 y=2", r"x = 1\quad y = 2", "normalised"),
    by_hand("thin", r"$\int f\,dx = 3$", r"\int f dx=3", r"\int f\,dx = 3", "normalised"),
    by_hand("composed-left", "ne\u0323\u0301 8", "\u1eb9\u0301 8", "e\u0323\u0301 8", "normalised"),
    by_hand("reordered", "xe\u0301\u0323 8", "e\u0323\u0301  8", "e\u0301\u0323 8", "normalised"),
    by_hand("bengali-vowel", "হল\u09c7\u09be ১২", "ল\u09cb ১২", "ল\u09c7\u09be ১২", "normalised"),
    by_hand("hangul", "답은 \u1112\u1161\u11ab 개", "한 개", "\u1112\u1161\u11ab 개", "normalised"),
    by_hand("singleton", "at 5 \u212b!", "5 \u00c5", "5 \u212b", "normalised"),
    by_hand("no-compatibility", "x² = 4", "x2 = 4", NOWHERE, "failed"),
    by_hand("case", "The sum is 12", "the sum is 12", "he sum is 12", "fuzzy"),
    by_hand("four-of-five", "abcdX", "abcde", "abcd", "fuzzy"),
    by_hand("three-of-five", "abcXX", "abcde", NOWHERE, "failed"),
    by_hand("no-blank-at-edge", "b foolish ones", "X foolish", "foolish", "fuzzy"),
    by_hand("overlap-last", "aaaa", "aa", (2, 4), "exact", "last"),
    by_hand("first-before-gap", "x = 1,\n\n\nx = 1", "x=1", (0, 5), "normalised"),
    by_hand("last-behind-gap", "x = 1,\n\n\nx = 1", "x=1", (9, 14), "normalised", "last"),
    by_hand("last-composed", "e\u0323\u0302" * 2, "\u1ec7", (3, 6), "normalised", "last"),
    by_hand("no-blank-at-end", "foolish ones b", "foolish ones X", "foolish ones", "fuzzy"),
    by_hand("marks-are-letters", "w\u1ecd\u0301 mo", "w\u1ecd\u0301mo", NOWHERE, "failed"),
    by_hand("ends-in-comma", "x  = 1{,} y", "x = 1,", "x  = 1{,}", "normalised"),
    by_hand("unchanged", "e\u0323 8 \u1ecd\u0301", "8  \u1ecd", "8 \u1ecd", "normalised"),
    by_hand("zwj-part", "two 👩‍👩‍👧 here", "👩‍👧", "👩‍👧", "exact"),
]
CASES = [c for lang in TEXTS for n in range(2) for c in variants(lang, n)] + HAND_MADE


def test_there_are_enough_cases():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.status for case in CASES} == set(token_spans.STATUSES)


def look(case: Case, threshold: float = 0.8) -> token_spans.Found:
    return token_spans.find_quote(
        case.text, case.quote, occurrence=case.occurrence, threshold=threshold
    )


@pytest.mark.parametrize("name", ["tiny", "qwen3"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, name):
    vocab = vocabulary(name)
    rng = np.random.default_rng(len(case.text))
    ids, rest = [], case.text
    for mark in ("<think>", "</think>", "<|im_end|>"):
        before, found, rest = rest.partition(mark)
        ids += vocab.cut(before, rng) + [vocab.specials[mark]] * bool(found)
        if not found:
            rest = ""
    decoded = token_spans.decode_tokens(ids, vocab.pieces)
    assert decoded.text == case.text
    found = look(case)
    assert found == token_spans.Found(case.start, case.end, case.status)
    if found.start < 0:
        return
    first = byte_place(ids, vocab, case.start)
    last = byte_place(ids, vocab, case.end - 1)
    if case.text[case.end - 1] >= "\x80":  # all tokens of its last character
        size = len(case.text[: case.end].encode())
        ends = np.cumsum([len(vocab.pieces[i]) for i in ids])
        last = int(np.flatnonzero(ends >= size)[0])
    assert token_spans.find_token_range(decoded, found.start, found.end) == (first, last + 1)


# ---- spans -----------------------------------------------------------------------------------


def characters_of_bytes(data: bytes) -> list[int]:
    """Number of the character of each byte: what a prefix that ends there decodes to."""
    return [len(data[: n + 1].decode("utf-8", "replace")) - 1 for n in range(len(data))]


def token_lists(size: int):
    return strategies.lists(strategies.integers(0, size - 1), max_size=40)


def check_spans(ids: list[int], pieces: list[bytes]) -> token_spans.Decoded:
    decoded = token_spans.decode_tokens(ids, pieces)
    parts = [pieces[i] for i in ids]
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    assert decoded.text == "".join(map(reader.decode, parts)) + reader.decode(b"", final=True)
    holds = characters_of_bytes(b"".join(parts))
    at = 0
    for part, start, end in zip(parts, decoded.starts, decoded.ends, strict=True):
        inside = holds[at : at + len(part)]
        empty = holds[at] if at < len(holds) else len(decoded.text)
        expected = (inside[0], inside[-1] + 1) if inside else (empty, empty)
        assert (start, end) == expected
        at += len(part)
    return decoded


def check_range(decoded: token_spans.Decoded, start: int, end: int) -> None:
    first, last = token_spans.find_token_range(decoded, start, end)
    spans = list(zip(decoded.starts.tolist(), decoded.ends.tolist(), strict=True))
    held = {c for s, e in spans[first:last] for c in range(s, e)}
    assert held >= set(range(start, end))
    assert all(e <= start or s == e for s, e in spans[:first])
    if start == end:
        assert first == last
        assert first == len(spans) or spans[first][1] > start
        return
    assert all(s >= end for s, e in spans[last:])
    for s, e in (spans[first], spans[last - 1]):
        assert s < end
        assert e > start


@pytest.mark.parametrize("name", ["tiny", "qwen3"])
@SOME
@hypothesis.given(data=strategies.data())
def test_any_ids_and_any_range(name, data):
    """Ids that no text has included: most tokens of the tiny vocabulary are parts of characters."""
    pieces = vocabulary(name).pieces
    decoded = check_spans(data.draw(token_lists(len(pieces))), pieces)
    ends = strategies.integers(0, len(decoded.text))
    check_range(decoded, *sorted((data.draw(ends), data.draw(ends))))


HARD = (
    b"a \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \xe0\x80\x9f \xed\xa0\x80 \xf4\x90\x80 \xc0\xf5 "
    b"\xef\xbf\xbd"
)
PARTS = sorted({HARD[i : i + n] for i in range(len(HARD)) for n in (0, 1, 2, 3)})


@SOME
@hypothesis.given(ids=token_lists(len(PARTS)), data=strategies.data())
def test_broken_characters_and_empty_tokens(ids, data):
    decoded = check_spans(ids, PARTS)
    ends = strategies.integers(0, len(decoded.text))
    check_range(decoded, *sorted((data.draw(ends), data.draw(ends))))


def test_every_beginning_of_a_character_is_cut_as_the_decoder_does():
    """All pairs of bytes, before and behind others: the tables of well-formed sequences."""
    pieces = [bytes([b]) for b in range(256)]
    for first, second in itertools.product(range(0x7E, 256), range(0x7E, 256)):
        for data in (bytes([first, second, 0x80, 0x41]), bytes([first, second, 0x9F, 0xBF, 0xE2])):
            decoded = token_spans.decode_tokens(list(data), pieces)
            assert decoded.starts.tolist() == characters_of_bytes(data)


def test_the_picture():
    pieces = [b"3 +", b"\xc3", b"\xa9", b" = 8"]
    decoded = token_spans.decode_tokens([0, 1, 2, 3], pieces)
    assert decoded.text == "3 +é = 8"
    assert decoded.starts.tolist() == [0, 3, 3, 4]
    assert decoded.ends.tolist() == [3, 4, 4, 8]
    assert token_spans.find_token_range(decoded, 3, 4) == (1, 3)
    assert token_spans.find_token_range(decoded, 2, 5) == (0, 4)
    assert token_spans.find_token_range(decoded, 4, 4) == (3, 3)
    assert token_spans.find_token_range(decoded, 8, 8) == (4, 4)


def test_nothing_decodes_to_nothing():
    decoded = token_spans.decode_tokens([], [b"a"])
    assert (decoded.text, decoded.starts.tolist(), decoded.ends.tolist()) == ("", [], [])
    assert token_spans.find_token_range(decoded, 0, 0) == (0, 0)


def test_encoding_a_prefix_again_is_off():
    """What the published code does, on ids as they are sampled."""
    vocab = vocabulary("tiny")
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    differ = 0
    for n in range(20):
        ids = vocab.cut("He has 8 oranges and buys 3. 8 + 3 = 12.", np.random.default_rng(n))
        decoded = token_spans.decode_tokens(ids, vocab.pieces)
        quoted = token_spans.find_quote(decoded.text, "8 + 3", occurrence="first", threshold=1.0)
        again = len(tok(decoded.text[: quoted.start], add_special_tokens=False)["input_ids"])
        differ += again != token_spans.find_token_range(decoded, quoted.start, quoted.end)[0]
    assert differ > 10


# ---- find, by brute force --------------------------------------------------------------------

# Bases that compose with none of the marks before them, so that units have one reading each.
UNITS = ("a", "b", "ẹ́", "ö", "12", "3", "+", "=", "é", "공", "கொ", ".")
Form = typing.Literal["NFC", "NFD"]
SPACES = ("", " ", "  ", r"\,", "~", "\n")


def spell(units: list[str], form: Form, gaps: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """A text of the units with gaps between, and the span of each unit."""
    text, spans = "", []
    for unit, gap in zip(units, gaps, strict=True):
        unit = unicodedata.normalize(form, unit)
        spans.append((len(text), len(text) + len(unit)))
        text += unit + gap
    return text, spans


def kind(unit: str) -> str:
    return "digit" if unit.isdecimal() else "letter" if unit not in "+=." else ""


def joined(units: list[str], gaps: list[str]) -> list[tuple[str, bool]]:
    """What has to agree: the units, and whether a gap separates two of a kind."""
    return [
        (unit, n > 0 and bool(gaps[n - 1]) and kind(units[n - 1]) == kind(unit) != "")
        for n, unit in enumerate(units)
    ]


@SOME
@hypothesis.given(
    parts=strategies.lists(
        strategies.tuples(strategies.sampled_from(UNITS), strategies.sampled_from(SPACES)),
        min_size=1,
        max_size=12,
    ),
    forms=strategies.permutations(["NFC", "NFD"]),
    data=strategies.data(),
)
def test_respelt_passage_is_found_where_it_stands(parts, forms, data):
    units, gaps = [unit for unit, _ in parts], [gap for _, gap in parts]
    text, spans = spell(units, forms[0], gaps)
    first = data.draw(strategies.integers(0, len(units) - 1))
    last = data.draw(strategies.integers(first, len(units) - 1))
    other = []
    for n in range(first, last):  # a gap that separates must not vanish, nor one appear
        alike = kind(units[n]) == kind(units[n + 1]) != ""
        choices = SPACES if not alike else SPACES[1:] if gaps[n] else ("",)
        other.append(data.draw(strategies.sampled_from(choices)))
    other.append("")
    quote, _ = spell(units[first : last + 1], forms[1], other)
    whole, wanted = joined(units, gaps), joined(units[first : last + 1], other)
    size = len(wanted)
    at = [
        n
        for n in range(len(whole) - size + 1)
        if whole[n][0] == wanted[0][0] and whole[n + 1 : n + size] == wanted[1:]
    ]
    starts = [spans[n][0] for n in at]
    hypothesis.assume("12" not in units or "3" not in units)  # "12" "3" also reads "1" "23"
    for policy, which in (("first", 0), ("last", -1)):
        found = token_spans.find_quote(text, quote, occurrence=policy, threshold=1.0)
        if found.status == "exact":
            assert text[found.start : found.end] == quote
            continue
        assert found.status == "normalised"
        assert (found.start, found.end) == (starts[which], spans[at[which] + size - 1][1])


def longest_common(text: str, quote: str) -> set[str]:
    parts = {quote[i:j] for i in range(len(quote)) for j in range(i + 1, len(quote) + 1)}
    common = {part for part in parts if part in text}
    size = max(map(len, common), default=0)
    return {part for part in common if len(part) == size}


LETTERS = strategies.text("aab01", max_size=25)


@SOME
@hypothesis.given(LETTERS, strategies.text("aab01", min_size=1, max_size=12), strategies.data())
def test_fuzzy_is_the_longest_common_part(text, quote, data):
    threshold = data.draw(strategies.sampled_from([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]))
    parts = longest_common(text, quote)
    size = len(min(parts, default=""))
    starts = [i for i in range(len(text)) if text[i : i + size] in parts]
    enough = parts and 10 * size >= round(10 * threshold) * len(quote)
    status = "failed" if not enough else "exact" if size == len(quote) else "fuzzy"
    for policy, which in (("first", 0), ("last", -1)):
        found = token_spans.find_quote(text, quote, occurrence=policy, threshold=threshold)
        assert found.status == status
        if enough:
            assert (found.start, found.end) == (starts[which], starts[which] + size)


def test_common_parts_of_all_short_words():
    text = "".join(np.random.default_rng(0).choice(list("ab"), 80))
    for letters in itertools.chain(*(itertools.product("ab", repeat=n) for n in range(1, 9))):
        word = "".join(letters)
        expected = [
            max(n for n in range(min(end, len(word)) + 1) if text[end - n : end] in word)
            for end in range(1, len(text) + 1)
        ]
        assert token_spans._measure_common(text, word) == expected, word


def test_threshold_is_no_product_of_floats():
    assert 0.56 * 25 > 14
    quote = "=" * 14 + "x" * 11
    found = token_spans.find_quote("=" * 14, quote, occurrence="first", threshold=0.56)
    assert found == token_spans.Found(0, 14, "fuzzy")


def test_a_common_blank_is_no_match():
    found = token_spans.find_quote("x y", "a b", occurrence="first", threshold=0.1)
    assert found == token_spans.Found(-1, -1, "failed")


ODD = (
    "a1 \u0301\u0323\u0344\u0f73\u0f72\u0f74\u09c7\u09be\u09d7\u1112\u1161\u11ab\u1eb9\u00e9\u0958"
    "\u212b\u0b92\u0bd7"
)


@SOME
@hypothesis.given(strategies.text(ODD, max_size=20))
@hypothesis.example("a\u0f73\u0301")  # the accent composes with the a, across U+0F71 and U+0F72
def test_composition_is_unicodes_and_points_back(text):
    composed = token_spans._compose(text)
    assert composed.text == unicodedata.normalize("NFC", text)
    spans = sorted(set(zip(composed.starts.tolist(), composed.ends.tolist(), strict=True)))
    assert "".join(text[s:e] for s, e in spans) == text
    for start, end in spans:
        mine = composed.starts == start
        assert (composed.ends[mine] == end).all()
        part = "".join(c for c, it in zip(composed.text, mine, strict=True) if it)
        assert part == unicodedata.normalize("NFC", text[start:end])


def test_time_does_not_grow_with_the_square():
    """8k tokens of each kind of trouble; a square would be minutes."""
    yoruba = TEXTS["yoruba_nfd"] * 400
    texts = [yoruba, "a" * 30_000, "\u0301\u0323" * 15_000, "1 + " * 8_000, "\\," * 15_000]
    texts.append("\u0f74\u0f73" * 15_000)  # neither composes nor comes apart
    for text in texts:
        for quote in ("b" + text[9_000:17_000:2], text[:9_000] + "x" * 9_000):
            before = time.process_time()
            token_spans.find_quote(text, quote, occurrence="last", threshold=0.8)
            assert time.process_time() - before < 5


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0, 2], [-1]])
def test_decode_refuses_unknown_ids(ids):
    with pytest.raises(ValueError, match=f"id {ids[-1]} is outside the vocabulary of 2"):
        token_spans.decode_tokens(ids, [b"a", b"b"])


@pytest.mark.parametrize("span", [(-1, 1), (2, 1), (0, 3)])
def test_tokens_refuses_a_range_outside(span):
    decoded = token_spans.decode_tokens([0, 0], [b"a"])
    with pytest.raises(ValueError, match="is not a range within a text of 2"):
        token_spans.find_token_range(decoded, *span)
