"""Turns the records of a source into rows.

A source is a JSONL file, a JSON list, a parquet file, a TSV file (question TAB answer, no header),
`bundled:train|held_out|exemplars`, or `tfds:NAME[:VERSION]/SPLIT`. The records of all sources have
the fields of COPSD's data: `problem` (English), `solution`, `answer` or `Answer`, and
`problem_<code>` (a translation). A record may also have `problem_<code>_ok`, the quality flag of
the translation. A translation whose quality flag is not true cannot be used.

An answer in the format of GSM8K, whose last line is `#### 42`, is split: the gold answer is 42. If
the record has no other solution, the text before this line is the solution, without GSM8K's
calculator annotations such as `<<6*7=42>>`.
"""

import collections
import decimal
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from copsd_jax.problems import languages, problem_row, record_files
from copsd_jax.problems.record_files import Record

FIELDS = ("id", "problem", "solution", "answer", "Answer", "group", "wording")  # and problem_*
_ANSWERS = ("answer", "Answer")
_OPTIONS = ("choices", "options")  # fields with the options of a multiple-choice question
# Matches a last line such as "#### 42"; a longer line, or a line without a digit, is a Markdown
# heading.
_MARKED = re.compile(r"(?:\A|\n)####(?!#)[ \t]*(?=[^\n]*\d)(\S+(?:[ \t]+\S+)?)[ \t]*\Z")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


FIELDS_SETTINGS = {"eval.path": "eval.fields"}  # by the setting of the path; others: data.fields


class UnusableValue(Exception):
    """A record cannot become a row; the message is the reason under which the record is counted."""


def rename_fields(
    path: str, records: list[Record], fields: str, setting: str = "data.fields"
) -> list[Record]:
    """Copies fields to new names.

    Args:
      path: the source, for error messages.
      records: the records.
      fields: a map from field names of this project to field names of the source, such as
        "problem=question,answer=final".
      setting: the name of the setting that gives `fields`, for error messages.

    Raises:
      ValueError: the map is malformed, or names an unknown field.
    """
    pairs = [tuple(pair.split("=")) for pair in fields.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"{setting} is {fields!r}: write pairs such as problem=question")
    for ours, theirs in pairs:
        if ours not in FIELDS and not ours.startswith("problem_"):
            choices = ", ".join((*FIELDS, "problem_<code>", "problem_<code>_ok"))
            raise ValueError(f"{setting} is {fields!r}: {ours!r} is none of {choices}")
        if sum(ours == name for name, _ in pairs) > 1:
            raise ValueError(f"{setting} is {fields!r}: {ours!r} occurs twice")
        if records and not any(theirs in record.fields for record in records):
            have = record_files.list_record_fields(records[0].fields)
            raise ValueError(f"{setting} is {fields!r}: {path} has no {theirs!r}; it has {have}")
    out = []
    for where, found in records:
        out.append(Record(where, found | {ours: found[old] for ours, old in pairs if old in found}))
    return out


def is_blank(value: object) -> bool:
    """Returns whether a value counts as absent: None, NaN, or a text without visible characters."""
    if isinstance(value, float | np.floating | decimal.Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def convert_problem_field(name: str, value: object) -> str:
    """Converts a field's value to text in NFC without surrounding blanks.

    An answer may also be a list of tool calls, each with an `Action`; the list becomes JSON text.

    Raises:
      UnusableValue: the value is missing, empty or not text.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableValue(f"{name} is not UTF-8") from error
    if is_blank(value):
        raise UnusableValue(f"{name} is {'empty' if isinstance(value, str) else 'missing'}")
    if name in _ANSWERS and _is_record_call_list(value):
        value = json.dumps(value, ensure_ascii=False, default=_spell_other)
    if isinstance(value, int | float | np.number | decimal.Decimal) and not isinstance(value, bool):
        value = _spell_number(name, value)
    if not isinstance(value, str):
        kind = value.type if isinstance(value, record_files.Unread) else type(value).__name__
        raise UnusableValue(f"{name} is not text ({kind})")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UnusableValue(f"{name} contains half a character (a lone surrogate)")
    # NFC gives each letter one spelling; most tokenizers encode other spellings differently.
    return unicodedata.normalize("NFC", value.strip())


def _is_record_call_list(value: object) -> bool:
    """Returns whether a value is a list of tool calls, as in ToolAlpaca."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and isinstance(x.get("Action"), str) for x in value)
    )


def _spell_other(value: object) -> Any:
    return float(value) if isinstance(value, decimal.Decimal) else str(value)


def _spell_number(name: str, value: Any) -> str:
    """Writes a number in digits; a whole number has no decimal point."""
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not math.isfinite(value):
        raise UnusableValue(f"{name} is {value}")
    # int(1e23) would be 99999999999999991611392, so the shortest decimal form gives the digits.
    exact = value if isinstance(value, decimal.Decimal) else decimal.Decimal(str(value))
    if abs(exact.adjusted()) > record_files.DIGITS:
        raise UnusableValue(f"{name} has more than {record_files.DIGITS:,} digits")
    if exact == exact.to_integral_value():
        return str(int(exact))
    return f"{value:f}" if isinstance(value, decimal.Decimal) else str(value)


def _read_first(record: Record, names: Sequence[str]) -> str:
    """Returns the text of the first field of `names` that is not blank."""
    present = [name for name in names if name in record.fields]
    filled = [name for name in present if not is_blank(record.fields[name])]
    for name in (*filled, *present):
        return convert_problem_field(name, record.fields[name])
    raise UnusableValue(f"{names[0]} is missing")


def _read_optional(record: Record, names: Sequence[str], needed: bool) -> str:
    """Reads a field with `_read_first`; returns "" if an optional field is absent or unusable.

    An answer that is present must be usable, because answers are read even if nothing needs them.
    """
    blank = all(is_blank(record.fields.get(name)) for name in names)
    try:
        return _read_first(record, names)
    except UnusableValue:
        if needed or (names == _ANSWERS and not blank):
            raise
        return ""


def _read_problem(record: Record, codes: Sequence[str]) -> str:
    """Returns the problem in one language; `codes` are the language's code and aliases."""
    english = ["problem"] if "en" in codes else []
    names = [f"problem_{code}" for code in codes] + english
    for name in names:
        flag = record.fields.get(f"{name}_ok")  # in parquet files, an absent field is null
        if not is_blank(flag) and not is_true(flag):
            raise UnusableValue(f"{name}_ok is not true")
    blank = all(is_blank(record.fields.get(name)) for name in names)
    return _read_first(record, english if blank and english else names)


def is_true(flag: object) -> bool:
    """Returns whether a quality flag is true: True, 1, or the text "true"."""
    number = isinstance(flag, bool | np.bool_ | int | float | np.number)
    return (number and flag == 1) or (isinstance(flag, str | bytes) and flag in ("true", b"true"))


def _read_solution_and_answer(record: Record, needs: Sequence[str]) -> tuple[str, str]:
    """Returns the solution and the gold answer; splits an answer in the format of GSM8K."""
    answer = _read_optional(record, _ANSWERS, "answer" in needs)
    solution = _read_optional(record, ("solution",), False)
    if marked := _MARKED.search(answer):
        steps = _ANNOTATION.sub("", answer[: marked.start()]).strip()
        solution = steps if solution in ("", answer) else solution
        answer = marked[1].strip()
    if not solution and "solution" in needs:
        _read_first(record, ("solution",))  # raises an error with the reason
        raise UnusableValue("solution is missing")
    return solution, answer


def _check_options(record: Record, problem: str) -> None:
    """Refuses a multiple-choice question whose problem text does not show every option."""
    shown = _fold_problem_text(problem)
    for name in _OPTIONS:
        options = _list_options(name, record.fields.get(name))
        if not all(_fold_problem_text(option) in shown for option in options):
            raise UnusableValue(f"the problem does not show the options of the field {name!r}")


def _fold_problem_text(text: str) -> str:
    """Converts a text to single blanks and lower case, so that "True" and "true" are equal."""
    return " ".join(text.casefold().split())


def _list_options(name: str, value: Any) -> Iterator[str]:
    """Yields the texts of options, from a list, or from an object such as {"text": [...]}."""
    pending = [value]  # a list, because deeply nested JSON could exceed Python's recursion limit
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [x for key, x in item.items() if key not in ("label", "labels")]
        elif isinstance(item, list | np.ndarray):
            pending += item if isinstance(item, list) else item.ravel().tolist()
        elif not is_blank(item):
            yield convert_problem_field(name, str(item) if isinstance(item, bool) else item)


def _build_row(
    record: Record, lang: str, codes: Sequence[str], needs: Sequence[str], key: str
) -> problem_row.Row:
    problem = _read_problem(record, codes)
    if "options" in needs:
        _check_options(record, problem)
    solution, answer = _read_solution_and_answer(record, needs)
    return problem_row.Row(
        id=key,
        problem=problem,
        solution=solution,
        answer=answer,
        lang=lang,
        problem_en=_read_optional(record, ("problem", "problem_en"), "problem_en" in needs),
        group=_read_optional(record, ("group", "wording"), "group" in needs),
    )


def _list_ids(path: str, records: Sequence[Record]) -> list[str]:
    """Returns the `id` of each record, or "row<n>" if the record has none; refuses repeated ids."""
    seen: dict[str, str] = {}
    for k, record in enumerate(records, start=1):
        key = f"row{k}"
        if not is_blank(value := record.fields.get("id")):
            try:
                key = convert_problem_field("id", value)
            except UnusableValue as reason:
                raise ValueError(f"{path}, {record.where}: {reason}") from reason
        if key in seen:
            raise ValueError(f"{path}: id {key[:60]!r} is in {seen[key]} and in {record.where}")
        seen[key] = record.where
    return list(seen)


def load_rows(
    path: str,
    langs: Sequence[str],
    *,
    missing: str = "error",
    fields: str = "",
    needs: Sequence[str] = ("answer",),
    limit: int = 0,
    registry: Mapping[str, languages.Language] | None = None,
    setting: str = "data.path",
    fields_setting: str = "",
) -> tuple[list[problem_row.Row], collections.Counter[str]]:
    """Loads a source's rows in each language of `langs`, one language after the other.

    Args:
      path: a source, in one of the forms that the module's docstring describes.
      langs: the codes or aliases of the languages.
      missing: "error" to refuse records that lack a needed field, or "drop" to leave such records
        out and count them.
      fields: a map from field names of this project to field names of the source, such as
        "problem=question,answer=final".
      needs: the fields that each row must have besides its problem; the choices are `solution`,
        `answer`, `problem_en`, `group` and `options`. For evaluation, rows need no solution. With
        `options`, a problem must show every option that its fields `choices` and `options` list.
      limit: the number of records to use from the start of the source; 0 for all.
      registry: the languages by code; None for the built-in languages.
      setting: the name of the setting that gives `path`, for error messages.
      fields_setting: the name of the setting that gives `fields`, for error messages; "" for the
        setting that belongs to `setting`.

    Returns:
      The rows, and the number of dropped rows for each reason. If there are several languages, a
      row's id is "<id>/<lang>", because each problem occurs once per language.

    Raises:
      OSError: there is no such file or data set, or the file cannot be read.
      ValueError: a record cannot be used, or no row is left. The message names the file, the first
        unusable record, and the number of unusable records.
    """
    registry = languages.load_languages() if registry is None else registry
    codes = [languages.resolve_code(code, registry) for code in langs]
    if len(set(codes)) != len(codes) or not codes:
        lang_setting = "eval.lang" if setting == "eval.path" else "data.lang"
        raise ValueError(
            f"{lang_setting} is {', '.join(langs)!r}: name at least one language, and none twice"
        )
    if path.endswith(".tsv") and len(codes) > 1:
        raise ValueError(f"{setting} is {path!r}: a TSV file has one language, not {langs}")
    fields_setting = fields_setting or FIELDS_SETTINGS.get(setting, "data.fields")
    records = record_files.read_records(path, lang=codes[0], setting=setting)
    records = rename_fields(path, records, fields, fields_setting)[: limit or None]
    ids = _list_ids(path, records)
    rows, dropped, first = [], collections.Counter[str](), {}
    for lang in codes:
        names = (lang, *registry[lang].aliases)
        for record, key in zip(records, ids, strict=True):
            key = f"{key}/{lang}" if len(codes) > 1 else key
            try:
                rows.append(_build_row(record, lang, names, needs, key))
            except UnusableValue as reason:
                dropped[str(reason)] += 1
                first.setdefault(str(reason), record)
    if dropped and (missing == "error" or not rows):
        _refuse_unusable(path, dropped, first, len(rows), fields_setting)
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    return rows, dropped


def _refuse_unusable(
    path: str, dropped: Mapping[str, int], first: Mapping[str, Record], kept: int, setting: str
) -> NoReturn:
    """Raises an error about the first unusable record, with the counts of all reasons."""
    reason = next(iter(dropped))
    more = "; ".join(f"{name}: {count}" for name, count in dropped.items())
    total = kept + sum(dropped.values())
    advice = "data.missing=drop leaves such rows out" if kept else "no row is left"
    if reason.endswith(" is missing"):
        have = record_files.list_record_fields(first[reason].fields) or "nothing"
        advice += f"; the record has {have}, and {setting} can map names"
    raise ValueError(
        f"{path}, {first[reason].where}: {reason} (unusable among {total} rows: {more}; {advice})"
    )
