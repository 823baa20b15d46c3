"""Turns the records of a source into rows.

A source is a JSONL file, a JSON list, a parquet file, a CSV file with a header, a TSV file
(question TAB answer, no header), a folder or a glob of such files,
`bundled:train|held_out|exemplars`, `tfds:NAME[:VERSION]/SPLIT`, or
`hf:OWNER/NAME[/CONFIG]:SPLIT`. The records of all sources have the fields of COPSD's data:
`problem` (English), `solution`, `answer` or `Answer`, and `problem_<code>` (a translation). A
record may also have `problem_<code>_ok`, the quality flag of the translation. A translation whose
quality flag is not true cannot be used.

An answer in the format of GSM8K, whose last line is `#### 42`, is split: the gold answer is 42. If
the record has no other solution, the text before this line is the solution, without GSM8K's
calculator annotations such as `<<6*7=42>>`.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from copsd_jax.problems import (
    field_values,
    gold_answers,
    languages,
    problem_row,
    record_fields,
    record_files,
    source_files,
)
from copsd_jax.problems.record_files import Record

_ANSWERS = ("answer", "Answer")
_OPTIONS = ("choices", "options")  # fields with the options of a multiple-choice question
# Matches a last line such as "#### 42"; a longer line, or a line without a digit, is a Markdown
# heading.
_MARKED = re.compile(r"(?:\A|\n)####(?!#)[ \t]*(?=[^\n]*\d)(\S+(?:[ \t]+\S+)?)[ \t]*\Z")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


FIELDS_SETTINGS = {"eval.path": "eval.fields"}  # by the setting of the path; others: data.fields


def _read_first(record: Record, names: Sequence[str]) -> str:
    """Returns the text of the first field of `names` that is not blank."""
    present = [name for name in names if name in record.fields]
    filled = [name for name in present if not field_values.is_blank(record.fields[name])]
    for name in (*filled, *present):
        return field_values.convert_problem_field(name, record.fields[name])
    raise field_values.UnusableValue(f"{names[0]} is missing")


def _read_optional(record: Record, names: Sequence[str], needed: bool) -> str:
    """Reads a field with `_read_first`; returns "" if an optional field is absent or unusable.

    An answer that is present must be usable, because answers are read even if nothing needs them.
    """
    blank = all(field_values.is_blank(record.fields.get(name)) for name in names)
    try:
        return _read_first(record, names)
    except field_values.UnusableValue:
        if needed or (names == _ANSWERS and not blank):
            raise
        return ""


def _read_problem(record: Record, codes: Sequence[str]) -> str:
    """Returns the problem in one language; `codes` are the language's code and aliases."""
    english = ["problem"] if "en" in codes else []
    names = [f"problem_{code}" for code in codes] + english
    for name in names:
        flag = record.fields.get(f"{name}_ok")  # in parquet files, an absent field is null
        if not field_values.is_blank(flag) and not field_values.is_true(flag):
            raise field_values.UnusableValue(f"{name}_ok is not true")
    blank = all(field_values.is_blank(record.fields.get(name)) for name in names)
    return _read_first(record, english if blank and english else names)


def _read_solution_and_answer(
    record: Record, needs: Sequence[str], rule: gold_answers.Rule | None
) -> tuple[str, str]:
    """Returns the solution and the gold answer; splits an answer in the format of GSM8K.

    With a rule, a record without an answer has its gold answer in the solution.
    """
    solution = _read_optional(record, ("solution",), False)
    answer = _read_optional(record, _ANSWERS, "answer" in needs and not (rule and solution))
    if rule and (text := answer or solution):
        name = "answer" if answer else "solution"
        gold, steps = gold_answers.extract_gold(rule, name, text)
        if answer and solution in ("", answer):
            solution = _ANNOTATION.sub("", steps)
        answer = gold
    elif marked := _MARKED.search(answer):
        steps = _ANNOTATION.sub("", answer[: marked.start()]).strip()
        solution = steps if solution in ("", answer) else solution
        answer = marked[1].strip()
    if not solution and "solution" in needs:
        _read_first(record, ("solution",))  # raises an error with the reason
        raise field_values.UnusableValue("solution is missing")
    return solution, answer


def _check_options(record: Record, problem: str) -> None:
    """Refuses a multiple-choice question whose problem text does not show every option."""
    shown = _fold_problem_text(problem)
    for name in _OPTIONS:
        options = field_values.list_options(name, record.fields.get(name))
        if not all(_fold_problem_text(option) in shown for option in options):
            raise field_values.UnusableValue(
                f"the problem does not show the options of the field {name!r}"
            )


def _fold_problem_text(text: str) -> str:
    """Converts a text to single blanks and lower case, so that "True" and "true" are equal."""
    return " ".join(text.casefold().split())


def _build_row(
    record: Record,
    lang: str,
    codes: Sequence[str],
    needs: Sequence[str],
    key: str,
    rule: gold_answers.Rule | None,
) -> problem_row.Row:
    problem = _read_problem(record, codes)
    if "options" in needs:
        _check_options(record, problem)
    solution, answer = _read_solution_and_answer(record, needs, rule)
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
        if not field_values.is_blank(value := record.fields.get("id")):
            try:
                key = field_values.convert_problem_field("id", value)
            except field_values.UnusableValue as reason:
                raise ValueError(f"{path}, {record.where}: {reason}") from reason
        if key in seen:
            raise ValueError(f"{path}: id {key[:60]!r} is in {seen[key]} and in {record.where}")
        seen[key] = record.where
    return list(seen)


class Loaded(NamedTuple):
    """The rows of a source.

    Attributes:
      rows: the rows in each language, one language after the other.
      dropped: the number of dropped rows for each reason.
      unread: the names of the fields that nothing reads.
    """

    rows: list[problem_row.Row]
    dropped: collections.Counter[str]
    unread: tuple[str, ...] = ()


def load_rows(
    path: str,
    langs: Sequence[str],
    *,
    missing: str = "error",
    fields: str = "",
    needs: Sequence[str] = ("answer",),
    limit: int = 0,
    answer: str = "",
    registry: Mapping[str, languages.Language] | None = None,
    setting: str = "data.path",
    fields_setting: str = "",
) -> tuple[list[problem_row.Row], collections.Counter[str]]:
    """Loads a source as `load_source` does; returns only the rows and the dropped rows' counts."""
    return load_source(
        path, langs, missing=missing, fields=fields, needs=needs, limit=limit, answer=answer,
        registry=registry, setting=setting, fields_setting=fields_setting,
    )[:2]  # fmt: skip


def load_source(
    path: str,
    langs: Sequence[str],
    *,
    missing: str = "error",
    fields: str = "",
    needs: Sequence[str] = ("answer",),
    limit: int = 0,
    answer: str = "",
    registry: Mapping[str, languages.Language] | None = None,
    setting: str = "data.path",
    fields_setting: str = "",
) -> Loaded:
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
      answer: how the gold answer is taken from its text, as in `gold_answers`; "" for the text.
      registry: the languages by code; None for the built-in languages.
      setting: the name of the setting that gives `path`, for error messages.
      fields_setting: the name of the setting that gives `fields`, for error messages; "" for the
        setting that belongs to `setting`.

    Returns:
      The rows, the number of dropped rows for each reason, and the fields that nothing reads. If
      there are several languages, a row's id is "<id>/<lang>", because each problem occurs once per
      language.

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
    one_lang = not path.startswith(record_files.NAMED) and source_files.is_tsv(path)
    if one_lang and len(codes) > 1:
        raise ValueError(f"{setting} is {path!r}: a TSV file has one language, not {langs}")
    own_setting = FIELDS_SETTINGS.get(setting, "data.fields")
    fields_setting = fields_setting or own_setting
    rule = gold_answers.parse_rule(answer, own_setting.replace("fields", "answer"))
    records = record_files.read_records(path, lang=codes[0], setting=setting)
    unread = record_fields.list_unread_fields(
        records, fields, _OPTIONS if "options" in needs else ()
    )
    records = record_fields.rename_fields(path, records, fields, fields_setting)[: limit or None]
    ids = _list_ids(path, records)
    rows, dropped, first = [], collections.Counter[str](), {}
    for lang in codes:
        names = (lang, *registry[lang].aliases)
        for record, key in zip(records, ids, strict=True):
            key = f"{key}/{lang}" if len(codes) > 1 else key
            try:
                rows.append(_build_row(record, lang, names, needs, key, rule))
            except field_values.UnusableValue as reason:
                dropped[str(reason)] += 1
                first.setdefault(str(reason), record)
            except ValueError as error:  # a search that takes too long
                raise ValueError(f"{path}, {record.where}: {error}") from error
    if dropped and (missing == "error" or not rows):
        _refuse_unusable(path, dropped, first, len(rows), fields_setting, fields)
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    return Loaded(rows, dropped, unread)


def _refuse_unusable(
    path: str,
    dropped: Mapping[str, int],
    first: Mapping[str, Record],
    kept: int,
    setting: str,
    fields: str,
) -> NoReturn:
    """Raises an error about the first unusable record, with the counts of all reasons."""
    reason = next(iter(dropped))
    more = "; ".join(f"{name}: {count}" for name, count in dropped.items())
    total = kept + sum(dropped.values())
    advice = "data.missing=drop leaves such rows out" if kept else "no row is left"
    if reason.endswith(" is missing"):
        have = record_files.list_record_fields(first[reason].fields) or "nothing"
        advice += f"; the record has {have}, and {setting} can map names"
        name = reason.removesuffix(" is missing")
        if near := record_fields.suggest_field(name, first[reason].fields):
            whole = f"{fields},{name}={near}" if fields else f"{name}={near}"
            advice += f": --config.{setting}={whole}"
    raise ValueError(
        f"{path}, {first[reason].where}: {reason} (unusable among {total} rows: {more}; {advice})"
    )
