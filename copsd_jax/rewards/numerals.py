"""Numerals of every script, and the exact values of numbers written in digits."""

import fractions
import re
import unicodedata

LONGEST = 1000  # maximum length of an answer that is parsed as a number or by math-verify
_LARGEST_EXPONENT = 400

# Arabic percent, decimal and thousands signs; full-width signs; minus signs and hyphens.
_SIGNS = str.maketrans(
    "\u066a\u066b\u066c\uff0e\uff0c\uff0f\uff05\uff0b\uff1a\uff0d\ufe63\u2212\u2010\u2011\u2013",
    "%.,.,/%+:------",
)
# The length of a numeral is limited to 32 characters, because each ፼ makes the number 10,000 times
# as large.
_ETHIOPIC = re.compile("(?<![\u1369-\u137c])[\u1369-\u137c]{1,32}(?![\u1369-\u137c])")
_ETHIOPIC_PAIR = "[\u1372-\u137a]?[\u1369-\u1371]?"  # tens and ones
_ETHIOPIC_GROUP = re.compile(f"(?:({_ETHIOPIC_PAIR})(\u137b))?({_ETHIOPIC_PAIR})")  # 0..9999


def _ethiopic(run: str) -> str:
    """Converts one Ge'ez numeral to ASCII digits; returns a malformed numeral unchanged.

    Ge'ez numerals are not positional: ፪፻፴ is 2 x 100 + 30, and ፼ multiplies the number before
    it by 10,000.
    """
    total = 0
    for index, group in enumerate(run.split("\u137c")):
        match = _ETHIOPIC_GROUP.fullmatch(group)
        if match is None:
            return run
        # Without a numeral before the sign, ፼ means 10,000 and ፻ means 100.
        total = (total or min(index, 1)) * 10_000 + _pair(match[3])
        total += (_pair(match[1]) or 1) * 100 if match[2] else 0
    return str(total)


def _pair(text: str) -> int:
    return sum(int(unicodedata.numeric(c)) for c in text)


def fold_digits(text: str) -> str:
    """Converts digits, signs and separators of every script to ASCII.

    The function converts all decimal digits of Unicode (category Nd, including full-width forms),
    the Ge'ez numerals of Amharic and Tigrinya, the Arabic separators and the full-width signs.
    Characters such as ² or ½ are kept, because they are not decimal digits.
    """
    if text.isascii():
        return text
    text = _ETHIOPIC.sub(lambda match: _ethiopic(match[0]), text.translate(_SIGNS))
    folded = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    # The Arabic comma also separates words, so it is a thousands separator only between digits.
    return re.sub("(?<=[0-9])\u060c(?=[0-9])", ",", "".join(folded))


_NUMBER = re.compile(
    r"""([+-]?)(?:
      (?P<plain>\d+\.?|\d*\.\d+)
    | (?P<grouped>[1-9]\d{0,2}(?P<mark>[, '’])\d{3}(?:(?P=mark)\d{3})*(?:\.\d+)?)
    | (?P<indian>\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?)
    | (?P<dots>[1-9]\d{0,2}(?:\.\d{3}){2,}|[1-9]\d{0,2}(?:[. ]\d{3})+,\d+)
    | (?P<comma>\d+,\d+)
    )""",
    re.VERBOSE,
)
_DIGITS = r"[\d.,]+"
_FRACTION = re.compile(
    rf"""(?P<sign>[+-]?)(?P<whole>\d+(?=\ ?\\|\ ))?\ ?
    (?:\\frac\ ?(?:\{{\ ?(?P<a>[+-]?{_DIGITS})\ ?\}}\ ?\{{\ ?(?P<b>{_DIGITS})\ ?\}}
      | (?P<c>\d)\ ?(?P<d>\d))
    | (?P<e>{_DIGITS})\ ?/\ ?(?P<f>{_DIGITS}))""",
    re.VERBOSE,
)
_POWER_OF_TEN = re.compile(
    rf"(?P<factor>[+-]?{_DIGITS})(?: ?(?:\\times|\\cdot|\*|×|x) ?10 ?\^ ?(?P<braced>\{{ ?)?|[eE])"
    r"(?P<exponent>[+-]?\d{1,9})(?(braced) ?\})"
)


def parse_number(text: str, comma: bool = False) -> str | None:
    """Returns a number in canonical digits ("-12.5"), or None if the text is not a number.

    Thousands may be separated by a comma, a blank, an apostrophe, or a dot that cannot be a decimal
    point. Indian grouping (1,00,000) is also read. If `comma` is set, "12,5" is read as 12.5, but
    "1,234" is still read as 1234.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or (match["comma"] and not comma):
        return None
    digits = text[len(match[1]) :]
    if match["dots"] or match["comma"]:
        digits = digits.replace(".", "").replace(",", ".")
    whole, _, part = re.sub("[, '’]", "", digits).partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number


def parse_exact(text: str) -> fractions.Fraction | None:
    """Returns the exact value of a number, a fraction, a mixed number, or a number times 10^n.

    The result is None for any other text.
    """
    if len(text) > LONGEST:
        return None
    if number := parse_number(text):
        return fractions.Fraction(number)
    if match := _POWER_OF_TEN.fullmatch(text):
        factor, exponent = parse_number(match["factor"]), int(match["exponent"])
        if factor is None or abs(exponent) > _LARGEST_EXPONENT:
            return None
        return fractions.Fraction(factor) * fractions.Fraction(10) ** exponent
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above = parse_number(match["a"] or match["c"] or match["e"])
    below = parse_number(match["b"] or match["d"] or match["f"])
    if above is None or below in (None, "0") or (match["whole"] and above.startswith("-")):
        return None
    value = int(match["whole"] or 0) + fractions.Fraction(above) / fractions.Fraction(below)
    return -value if match["sign"] == "-" else value


_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<start>\d*)\\(?:overline|bar|dot) ?\{ ?(?P<period>\d+) ?\}"
)


def replace_repeating(text: str) -> str:
    r"""Replaces each repeating decimal, such as 0.1\overline{6}, by a fraction."""

    def rewrite(match: re.Match) -> str:
        whole, start, period = match["whole"] or "0", match["start"], match["period"]
        below = int("9" * len(period) + "0" * len(start))
        above = int(whole + start + period) - int(whole + start)
        return rf"\frac{{{above}}}{{{below}}}"

    return _REPEATING.sub(rewrite, text) if len(text) <= LONGEST else text
