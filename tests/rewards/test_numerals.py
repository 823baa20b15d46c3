"""Oracles: tables of strings, an encoder of Ge'ez numerals, Unicode's own tables."""

import sys
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies

from copsd_jax.rewards import numerals

FEW = hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    "text, folded",
    [
        ("٤٢", "42"),  # Arabic-Indic
        ("۴۲", "42"),  # Persian
        ("৪২", "42"),  # Bengali
        ("४२", "42"),  # Devanagari
        ("๔๒", "42"),  # Thai
        ("౪౨", "42"),  # Telugu
        ("꘤꘢", "42"),  # Vai
        ("߄߂", "42"),  # N'Ko
        ("４２", "42"),  # full-width
        ("𝟒𝟚", "42"),  # mathematical
        ("١٢٬٣٤٥٫٦", "12,345.6"),
        ("١٢،٣٤٥", "12,345"),
        ("س، ص", "س، ص"),  # a comma between words stays
        ("－１２．５", "-12.5"),
        ("−7", "-7"),
        ("x²", "x²"),
        ("½", "½"),
        ("፵፪", "42"),
        ("፲፱፻፹፫ ዓ.ም.", "1983 ዓ.ም."),
        ("፩፪", "፩፪"),  # two ones make no Ge'ez number
        ("፼" * 40, "፼" * 40),
    ],
)
def test_digits_of_many_scripts(text, folded):
    assert numerals.fold_digits(text) == folded


def test_every_decimal_digit_of_unicode():
    digits = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Nd"]
    assert len(digits) > 600
    for digit in digits:
        assert numerals.fold_digits(digit) == str(int(digit))


def geez(number: int) -> str:
    """Ge'ez numeral, built from the right in pairs of digits with ፻ and ፼ in turn."""
    text = ""
    pairs = []
    while number:
        number, pair = divmod(number, 100)
        pairs.append(pair)
    for place, pair in enumerate(pairs):
        tens, ones = divmod(pair, 10)
        name = "፲፳፴፵፶፷፸፹፺"[tens - 1 : tens] + "፩፪፫፬፭፮፯፰፱"[ones - 1 : ones]
        mark = "" if place == 0 else "፻" if place % 2 else "፼"
        if not pair and mark == "፻":
            mark = ""
        leads = place == len(pairs) - 1
        if name == "፩" and (mark == "፻" or (mark and leads)):
            name = ""  # one hundred is ፻, and a leading ten thousand ፼
        text = name + mark + text
    return text


@FEW
@hypothesis.given(strategies.integers(1, 10**11))
def test_geez_numbers_are_read_as_written(number):
    assert numerals.fold_digits(geez(number)) == str(number)


def test_geez_encoder_of_this_test():
    table = {100: "፻", 1000: "፲፻", 10**4: "፼", 10**6: "፻፼", 10**8: "፼፼", 100010000: "፼፩፼"}
    assert {number: geez(number) for number in table} == table
    assert numerals.fold_digits("፼፲፩፻፲፩") == "11111"
