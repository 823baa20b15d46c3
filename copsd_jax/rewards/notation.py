r"""One spelling for the many notations of an answer: Unicode mathematics, LaTeX, Markdown.

`fold` changes only the spelling: two texts with equal folds have the same meaning. It keeps the row
separator `\\` of matrices and the case of letters.
"""

import re
import unicodedata

from copsd_jax.rewards import numerals

DOLLAR = "\uff04"  # stands for a currency dollar, because $ delimits mathematics

_GREEK = {
    character: f"\\{name} "
    for first, names in (
        ("α", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"),
        ("π", "pi rho"),
        ("σ", "sigma tau upsilon phi chi psi omega"),
        ("Γ", "Gamma Delta"),
        ("Θ", "Theta"),
        ("Λ", "Lambda"),
        ("Ξ", "Xi"),
        ("Π", "Pi"),
        ("Σ", "Sigma"),
        ("Φ", "Phi"),
        ("Ψ", "Psi Omega"),
    )
    for character, name in zip(map(chr, range(ord(first), 0x3CA)), names.split(), strict=False)
}
_SYMBOLS = {
    "°": "^\\circ ", "º": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F", "∞": "\\infty ",
    "×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ",
    "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∉": "\\notin ",
    "∅": "\\emptyset ", "∖": "\\setminus ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "…": "\\ldots ", "⟨": "\\langle ",
    "⟩": "\\rangle ", "∑": "\\sum ", "∏": "\\prod ", "∫": "\\int ", "′": "'", "∠": "\\angle ",
    "△": "\\triangle ", "（": "(", "）": ")", "［": "[", "］": "]", "｛": "\\{", "｝": "\\}",
    "＝": "=", "＜": "<", "＞": ">", "、": ",", "，": ",", "；": ";", "٫": ".", "‰": "‰",
}  # fmt: skip
_ROOT = re.compile(r"([√∛∜])\s*(\([^()]*\)|\d+(?:\.\d+)?|\{[^{}]*\}|\\?[^\W\d_]+)")
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-n0123456789+-")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")

# The first alternative keeps row separators. Without this alternative, the second backslash of
# `\\ ` would be read as the command `\ `.
_COMMANDS = re.compile(
    r"""(?P<row>\\\\)(?:\s*\[[^\]\n]*\])?
    | (?P<none>\\!\s*|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits)
      (?![a-zA-Z])\.?)
    | (?P<blank>\\[,;:>\ ]|\\q?quad(?![a-zA-Z])|\\(?:thinspace|enspace|medspace)(?![a-zA-Z])|~)
    | (?P<comma>\{,\})
    | (?P<frac>\\[dtc]frac(?![a-zA-Z]))
    | (?P<same>\\(?:varnothing|geqslant|leqslant|geq|leq|neq|lbrace|rbrace|dots|cdots|dotsc|degree
      |textdegree|land|lor|infin|gt|lt|euro|pounds|textdollar)(?![a-zA-Z]))
    | (?P<dollar>\\\$)
    | (?P<percent>\\%)""",
    re.VERBOSE,
)
_SAME = {
    "\\varnothing": "\\emptyset ", "\\geqslant": "\\ge ", "\\leqslant": "\\le ", "\\geq": "\\ge ",
    "\\leq": "\\le ", "\\neq": "\\ne ", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\dots": "\\ldots ",
    "\\cdots": "\\ldots ", "\\dotsc": "\\ldots ", "\\degree": "^\\circ ", "\\gt": ">", "\\lt": "<",
    "\\textdegree": "^\\circ ", "\\infin": "\\infty ", "\\land": " and ", "\\lor": " or ",
    "\\euro": "€", "\\pounds": "£", "\\textdollar": DOLLAR,
}  # fmt: skip
# Commands that change only the look of their argument.
_WRAPPER = re.compile(
    r"""\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|mathbf|mathit|mathsf
    |mathnormal|boldsymbol|bm|mbox|hbox|fbox|boxed|underline|operatorname\*?|ensuremath
    |textcolor\s*\{[^{}]*\}|color\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\})\s*\{([^{}]*)\}""",
    re.VERBOSE,
)
_COLOR = re.compile(r"\\color\s*\{[^{}]*\}")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))\s*")
_STARS = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*|__(?=\S)(.+?)(?<=\S)__|`([^`]+)`", re.DOTALL)
_BRACED = re.compile(r"\{([^{}\\]*)\}")  # a whole answer in braces
_SHORT_FRACTION = re.compile(r"\\frac ?(\d) ?(\d)(?!\d)")
_END = re.compile(r"(?:[\s.,;:。．、，।॥።፣۔؟！!？]|(?<!\\)\\(?![{}\\]))+$")
_OWN_END = re.compile(r"(?:\bp\.m|\ba\.m|[0-9a-z)\]}]!)[.,;:]*$")
_EQUALS = re.compile(r"^(?:=|:|\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])|\\therefore(?![a-zA-Z]))\s*")
_LIST_JOIN = re.compile(r"(?<=[\d)}\]])\s*,?\s+(?:and|or)\s+(?=[-\d(\\\[])")
_MAXIMUM_DEPTH = 8
_LONGEST = 10_000  # longer texts skip most rules, because some rules take quadratic time


def fold(text: str) -> str:
    """Folds the notation of an answer to one spelling, and removes marks around the answer."""
    fallback = " ".join(text.replace("$", " ").split())
    text = numerals.fold_digits(unicodedata.normalize("NFC", text))
    if len(text) > _LONGEST:
        return " ".join(text.replace("$", " ").split())
    text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    text = _fold_commands(_fold_dollars(_fold_unicode(text)))
    for _ in range(_MAXIMUM_DEPTH):  # wrappers may be nested
        inner = _STARS.sub(lambda match: match[1] or match[2] or match[3], text)
        inner = _COLOR.sub(" ", _WRAPPER.sub(lambda match: _separate(match), inner))
        if inner == text:
            break
        text = inner
    text = _DEGREE.sub("°", text)
    text = numerals.replace_repeating(_SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))
    text = re.sub(r"\\{\s*\\}", r"\\emptyset", text)
    text = _LIST_JOIN.sub(", ", " ".join(text.replace("\0", " ").split()))
    text = _EQUALS.sub("", _strip_end(text))
    whole = _BRACED.fullmatch(text)
    return (_strip_end(whole[1].strip()) if whole else text) or fallback


def _separate(match: re.Match) -> str:
    r"""Returns the content of \text{...}; adds blanks that separate words from digits."""
    inner = match[1]
    wordy = len(inner.strip()) > 1 or inner != inner.strip() or "{" not in match[0][:6]
    return f" {inner} " if wordy or match[0].startswith("\\text") else inner


def _fold_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2].strip('(){}')}}}", text)
    text = _VULGAR.sub(_spell_fraction, text)
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_PLAIN)}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_PLAIN)}}}", text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    # A Greek letter inside a Greek word is not a mathematical symbol.
    return re.sub("(?<![α-ωΑ-Ω])[α-ωΑ-Ω](?![α-ωΑ-Ωά-ώ])", lambda m: _GREEK.get(m[0], m[0]), text)


def _spell_fraction(match: re.Match) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _fold_dollars(text: str) -> str:
    """Removes the delimiters of mathematics; marks dollar signs that stand for a currency."""
    text = text.replace("\\$", DOLLAR)
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.lstrip().startswith(opening) and text.rstrip(" .\n").endswith(closing):
            text = text.replace(opening, " ").replace(closing, " ")
    text = re.sub(r"(?<=[A-Za-z])\$(?=\s?\d)", DOLLAR, text)  # US$ 5
    if text.count("$") % 2:
        text = re.sub(r"^(\W*)\$(?=\s?[\d.-])|(?<=\d)\s?\$(\W*)$", rf"\1{DOLLAR}\2", text)
    return text.replace("$", " ")


def _fold_commands(text: str) -> str:
    def rewrite(match: re.Match) -> str:
        kind = match.lastgroup
        if kind == "same":
            return _SAME[match[0]]
        table = {"row": r"\\", "none": "", "blank": " ", "comma": ",", "frac": r"\frac"}
        return {**table, "dollar": DOLLAR, "percent": "%"}[kind or ""]

    return _COMMANDS.sub(rewrite, text)


def _strip_end(text: str) -> str:
    if _OWN_END.search(text):
        return text.rstrip(".,;: ")
    return _END.sub("", text)
