"""Reads problems from files and data sets, and turns them into rows.

A source is a JSONL file, a JSON list, a parquet file, a TSV file (question TAB answer, no header),
`bundled:train|held_out|exemplars`, or `tfds:NAME[:VERSION]/SPLIT`. The records of all sources have
the fields of COPSD's data: `problem` (English), `solution`, `answer` or `Answer`, and
`problem_<code>` (a translation). A record may also have `problem_<code>_ok`, the quality flag of
the translation. A translation whose quality flag is not true cannot be used.
"""

import collections
import json
import math
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from copsd_jax.problems import bundled, languages, problem_row

SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv")
FIELDS = ("id", "problem", "solution", "answer", "Answer", "group", "wording")  # and problem_*


class Record(NamedTuple):
    """A record and its position in the source, such as "line 7" or "row 7" (counted from 1)."""

    where: str
    fields: dict[str, Any]


class UnusableValue(Exception):
    """A record cannot become a row; the message is the reason under which the record is counted."""


def _decode_source_text(path: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: the text is not UTF-8") from error


def _record(path: str, where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{path}, {where}: expected a JSON object, found {type(value).__name__}")
    return Record(where, value)


def _read_json(path: str, raw: bytes) -> list[Record]:
    """Reads a JSON list of objects, or a file with one JSON object per line."""
    text = _decode_source_text(path, raw)
    line, out = 0, []
    try:
        if text.lstrip()[:1] == "[":
            return [_record(path, f"row {k}", row) for k, row in enumerate(json.loads(text), 1)]
        # splitlines() is not used: it also splits at U+2028, which JSON strings may contain.
        for line, content in enumerate(text.split("\n")):
            if content.strip():
                out.append(_record(path, f"line {line + 1}", json.loads(content)))
        return out
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno}"
        raise ValueError(f"{at}: broken JSON ({error.msg}, column {error.colno})") from error


def _read_tsv(path: str, raw: bytes, field: str) -> list[Record]:
    """Reads lines "question TAB answer" without a header; the question is stored under `field`."""
    out = []
    for k, line in enumerate(_decode_source_text(path, raw).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 2:
            raise ValueError(
                f"{path}, line {k}: expected question TAB answer, found {len(cells)} cells"
            )
        out.append(Record(f"line {k}", {field: cells[0], "answer": cells[1]}))
    return out


def _read_parquet(path: str, raw: bytes) -> list[Record]:
    # pyarrow is imported lazily: the import is slow, and most runs read no parquet file.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    return [Record(f"row {k}", row) for k, row in enumerate(table.to_pylist(), start=1)]


def _find_tfds_folder(setting: str, path: str, name: str) -> pathlib.Path:
    """Returns the folder of the TFDS data set NAME[:VERSION]; the default is the newest version."""
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.utils import version as version_lib

    name, _, version = name.partition(":")
    root = pathlib.Path(constants.DATA_DIR).expanduser() / name
    every = map(str, version_lib.list_all_versions(root))
    versions = [v for v in every if (root / v / constants.DATASET_INFO_FILENAME).is_file()]
    if not versions or (version and version not in versions):
        have = f"it has {', '.join(versions)}" if versions else "there is none"
        raise FileNotFoundError(
            f"{setting} is {path!r}: no prepared version {version or 'of it'} in {root}: {have}"
        )
    return root / (version or versions[-1])


def _read_tfds(setting: str, path: str) -> list[Record]:
    import tensorflow_datasets as tfds  # imported lazily: the import is slow

    name, slash, split = path.removeprefix("tfds:").rpartition("/")
    if not slash or not name or not split:
        raise ValueError(f"{setting} is {path!r}: write tfds:NAME/SPLIT or tfds:NAME:VERSION/SPLIT")
    builder = tfds.builder_from_directory(_find_tfds_folder(setting, path, name))
    if split.partition("[")[0] not in builder.info.splits:
        choices = ", ".join(builder.info.splits)
        raise ValueError(f"{setting} is {path!r}: no split {split!r}; the choices are {choices}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = getattr(builder.info.file_format, "value", "another format")
        raise ValueError(
            f"{setting} is {path!r}: it is stored as {found}, which needs TensorFlow to read; "
            "prepare it with file_format='array_record'"
        )
    out = []
    source: Any = builder.as_data_source  # a decorator hides all arguments from type checkers
    for k, example in enumerate(source(split), start=1):
        # Every TFDS example has every feature, so an absent field is stored as an empty text.
        absent = {key for key, v in example.items() if isinstance(v, bytes) and not v}
        out.append(Record(f"row {k}", {key: example[key] for key in example.keys() - absent}))
    return out


def read_records(path: str, *, lang: str = "en", setting: str = "data.path") -> list[Record]:
    """Reads all records of a source.

    Args:
      path: a source, in one of the forms that the module's docstring describes.
      lang: the code of the language in which the questions of a TSV file are written.
      setting: the name of the setting that gives `path`, for error messages.

    Raises:
      FileNotFoundError: there is no such file or data set.
      ValueError: the source cannot be read; the message names the file and the line or row.
    """
    if path.startswith("tfds:"):
        return _read_tfds(setting, path)
    if path.startswith("bundled:"):
        name = path.removeprefix("bundled:")
        if name not in bundled.NAMES:
            choices = ", ".join(f"bundled:{choice}" for choice in bundled.NAMES)
            raise ValueError(f"{setting} is {path!r}: the choices are {choices}")
        return _read_json(path, bundled.find_file(name).read_bytes())
    file = pathlib.Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{setting} is {path!r}: a file must end in {', '.join(SUFFIXES)}; "
            "other choices are bundled:NAME and tfds:NAME/SPLIT"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{setting} is {path!r}: there is no such file")
    if file.suffix == ".tsv":
        return _read_tsv(path, file.read_bytes(), f"problem_{lang}")
    if file.suffix == ".parquet":
        return _read_parquet(path, file.read_bytes())
    return _read_json(path, file.read_bytes())


def rename_fields(path: str, records: list[Record], fields: str) -> list[Record]:
    """Copies fields to new names; `fields` is a map such as "problem=question,answer=final"."""
    pairs = [tuple(pair.split("=")) for pair in fields.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"data.fields is {fields!r}: write pairs such as problem=question")
    for ours, theirs in pairs:
        if ours not in FIELDS and not ours.startswith("problem_"):
            choices = ", ".join((*FIELDS, "problem_<code>", "problem_<code>_ok"))
            raise ValueError(f"data.fields is {fields!r}: {ours!r} is none of {choices}")
        if records and not any(theirs in record.fields for record in records):
            have = ", ".join(map(str, records[0].fields))
            raise ValueError(f"data.fields is {fields!r}: {path} has no {theirs!r}; it has {have}")
    out = []
    for where, found in records:
        out.append(Record(where, found | {ours: found[old] for ours, old in pairs if old in found}))
    return out


def convert_to_text(name: str, value: object) -> str:
    """Converts a field's value to text in NFC without surrounding blanks.

    Raises:
      UnusableValue: the value is missing, empty or not text.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        raise UnusableValue(f"{name} is missing")
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise UnusableValue(f"{name} is {value}")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UnusableValue(f"{name} is not text ({type(value).__name__})")
    if not value.strip():
        raise UnusableValue(f"{name} is empty")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UnusableValue(f"{name} contains half a character (a lone surrogate)")
    # NFC gives each letter one spelling; most tokenizers encode other spellings differently.
    return unicodedata.normalize("NFC", value.strip())


def _read_first(record: Record, names: Sequence[str]) -> str:
    """Returns the text of the first field of `names` that occurs in the record."""
    for name in names:
        if name in record.fields:
            return convert_to_text(name, record.fields[name])
    raise UnusableValue(f"{names[0]} is missing")


def _read_optional(record: Record, names: Sequence[str], needed: bool) -> str:
    """Reads a field with `_read_first`; returns "" if an optional field is blank or absent."""
    x = next((record.fields[name] for name in names if name in record.fields), None)
    blank = x is None or (isinstance(x, str | bytes) and not x.strip())
    if not needed and (blank or (isinstance(x, float) and math.isnan(x))):
        return ""
    return _read_first(record, names)


def _read_problem(record: Record, codes: Sequence[str]) -> str:
    """Returns the problem in one language; `codes` are the language's code and aliases."""
    names = [f"problem_{code}" for code in codes] + (["problem"] if "en" in codes else [])
    for name in names:
        flag = record.fields.get(f"{name}_ok")  # in parquet files, an absent field is null
        accepted = flag.decode() == "true" if isinstance(flag, bytes) else flag
        right = isinstance(accepted, bool | np.bool_ | np.integer) and accepted == 1
        if flag is not None and not right:
            raise UnusableValue(f"{name}_ok is not true")
    return _read_first(record, names)


def _build_row(
    record: Record, lang: str, codes: Sequence[str], needs: Sequence[str], key: str
) -> problem_row.Row:
    return problem_row.Row(
        id=key,
        problem=_read_problem(record, codes),
        solution=_read_optional(record, ("solution",), "solution" in needs),
        answer=_read_optional(record, ("answer", "Answer"), "answer" in needs),
        lang=lang,
        problem_en=_read_optional(record, ("problem", "problem_en"), "problem_en" in needs),
        group=_read_optional(record, ("group", "wording"), "group" in needs),
    )


def _list_ids(path: str, records: Sequence[Record]) -> list[str]:
    """Returns the `id` of each record, or "row<n>" if the record has none; refuses repeated ids."""
    seen: dict[str, str] = {}
    for k, record in enumerate(records, start=1):
        key = _read_optional(record, ("id",), False) or f"row{k}"
        if key in seen:
            raise ValueError(f"{path}: id {key!r} is in {seen[key]} and in {record.where}")
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
        `answer`, `problem_en` and `group`. For evaluation, rows need no solution.
      limit: the number of records to use from the start of the source; 0 for all.
      registry: the languages by code; None for the built-in languages.
      setting: the name of the setting that gives `path`, for error messages.

    Returns:
      The rows, and the number of dropped rows for each reason. If there are several languages, a
      row's id is "<id>/<lang>", because each problem occurs once per language.

    Raises:
      FileNotFoundError: there is no such file or data set.
      ValueError: a record cannot be used, or no row is left. The message names the file, the first
        unusable record, and the number of unusable records.
    """
    registry = languages.load_languages() if registry is None else registry
    codes = [languages.resolve_code(code, registry) for code in langs]
    if len(set(codes)) != len(codes) or not codes:
        raise ValueError(f"the languages are {', '.join(langs)}: give at least one, and none twice")
    if path.endswith(".tsv") and len(codes) > 1:
        raise ValueError(f"{setting} is {path!r}: a TSV file has one language, not {langs}")
    records = read_records(path, lang=codes[0], setting=setting)
    records = rename_fields(path, records, fields)[: limit or None]
    ids = _list_ids(path, records)
    rows, dropped, first_places = [], collections.Counter[str](), {}
    for lang in codes:
        names = (lang, *registry[lang].aliases)
        for record, key in zip(records, ids, strict=True):
            key = f"{key}/{lang}" if len(codes) > 1 else key
            try:
                rows.append(_build_row(record, lang, names, needs, key))
            except UnusableValue as reason:
                dropped[str(reason)] += 1
                first_places.setdefault(str(reason), record.where)
    _check_dropped(path, dropped, first_places, len(rows), missing)
    return rows, dropped


def _check_dropped(
    path: str, dropped: Mapping[str, int], first: Mapping[str, str], kept: int, missing: str
) -> None:
    """Refuses a source without rows; if `missing` is "error", also refuses dropped rows."""
    if dropped and (missing == "error" or not kept):
        reason = next(iter(dropped))
        more = "; ".join(f"{name}: {count}" for name, count in dropped.items())
        total = kept + sum(dropped.values())
        advice = "data.missing=drop leaves such rows out" if kept else "no row is left"
        raise ValueError(
            f"{path}, {first[reason]}: {reason} (unusable rows, of {total}: {more}; {advice})"
        )
    if not kept:
        raise ValueError(f"{path}: it has no rows")
