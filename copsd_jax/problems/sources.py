"""Reads problems from files and data sets into rows.

A source is a JSONL file, a JSON list, a parquet file, a TSV file (question TAB answer, no header),
`bundled:train|held_out|exemplars`, or `tfds:NAME[:VERSION]/SPLIT`. All of them give records in
COPSD's shape: `problem` (English), `solution`, `answer` or `Answer`, `problem_<code>` (translation)
and, where there is one, `problem_<code>_ok` (the translation's quality flag, which must be true).
"""

import collections
import importlib.resources
import json
import math
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from copsd_jax.problems import languages, problem_row

BUNDLED = ("train", "held_out", "exemplars")
SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv")
FIELDS = ("id", "problem", "solution", "answer", "Answer", "group", "wording")  # and problem_*


class Record(NamedTuple):
    """A record of a source and where it stands there ("line 7", "row 7"; counted from 1)."""

    where: str
    fields: dict[str, Any]


class UnusableValue(Exception):
    """Why a record gives no row: the reason that is counted and reported."""


def _decode(path: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: the text is not UTF-8") from error


def _object(path: str, where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}, {where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_json(path: str, raw: bytes) -> list[Record]:
    """A JSON list of objects, or one object per line."""
    text = _decode(path, raw)
    line = 0
    try:
        if text.lstrip()[:1] == "[":
            rows = enumerate(json.loads(text), start=1)
            return [Record(f"row {k}", _object(path, f"row {k}", value)) for k, value in rows]
        out = []
        # Not splitlines(): it also splits at U+2028, which JSON strings may hold.
        for line, content in enumerate(text.split("\n")):
            if content.strip():
                where = f"line {line + 1}"
                out.append(Record(where, _object(path, where, json.loads(content))))
        return out
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno}"
        raise ValueError(f"{at}: broken JSON ({error.msg}, column {error.colno})") from error


def _read_tsv(path: str, raw: bytes, field: str) -> list[Record]:
    """Question TAB answer on each line, no header; the question goes to `field`."""
    out = []
    for k, line in enumerate(_decode(path, raw).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 2:
            raise ValueError(f"{path}, line {k}: question TAB answer has {len(cells)} cells, not 2")
        out.append(Record(f"line {k}", {field: cells[0], "answer": cells[1]}))
    return out


def _read_parquet(path: str, raw: bytes) -> list[Record]:
    import pyarrow  # here, since it is slow to import and most runs read no parquet
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    return [Record(f"row {k}", row) for k, row in enumerate(table.to_pylist(), start=1)]


def _tfds_directory(setting: str, path: str, name: str, data_dir: str | None) -> pathlib.Path:
    """The folder of NAME[:VERSION] (the newest version unless given) under `data_dir`."""
    from tensorflow_datasets.core import constants

    name, _, version = name.partition(":")
    root = pathlib.Path(data_dir or constants.DATA_DIR).expanduser() / name
    found = {
        tuple(map(int, p.parent.name.split("."))): p.parent
        for p in root.glob("*.*.*/dataset_info.json")
        if p.parent.name.replace(".", "").isdigit()
    }
    versions = [folder.name for _, folder in sorted(found.items())]
    if not versions or (version and version not in versions):
        have = f"it has {', '.join(versions)}" if versions else "there is none"
        raise FileNotFoundError(
            f"{setting} is {path!r}: no prepared version {version or 'of it'} in {root}: {have}"
        )
    return root / (version or versions[-1])


def _read_tfds(setting: str, path: str, data_dir: str | None) -> list[Record]:
    import tensorflow_datasets as tfds  # here, since it is slow to import

    name, slash, split = path.removeprefix("tfds:").rpartition("/")
    if not slash or not name or not split:
        raise ValueError(f"{setting} is {path!r}: write tfds:NAME/SPLIT or tfds:NAME:VERSION/SPLIT")
    builder = tfds.builder_from_directory(_tfds_directory(setting, path, name, data_dir))
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
    source: Any = builder.as_data_source  # its decorator hides its arguments from type checkers
    for k, example in enumerate(source(split), start=1):
        # Every example has every feature: an empty text is how an absent field is stored.
        absent = {key for key, v in example.items() if isinstance(v, bytes) and not v}
        out.append(Record(f"row {k}", {key: example[key] for key in example.keys() - absent}))
    return out


def read(
    path: str, *, lang: str = "en", setting: str = "data.path", data_dir: str | None = None
) -> list[Record]:
    """All records of a source; `lang` is the language of a TSV file's questions.

    Raises:
      FileNotFoundError, ValueError: in one sentence that names the file and the line or row.
    """
    if path.startswith("tfds:"):
        return _read_tfds(setting, path, data_dir)
    if path.startswith("bundled:"):
        name = path.removeprefix("bundled:")
        if name not in BUNDLED:
            choices = ", ".join(f"bundled:{choice}" for choice in BUNDLED)
            raise ValueError(f"{setting} is {path!r}: the choices are {choices}")
        file = importlib.resources.files("copsd_jax.problems") / "bundled" / f"{name}.jsonl"
        return _read_json(path, file.read_bytes())
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
    """Records with the fields of a map "ours=theirs,ours=theirs" under our names too."""
    pairs = [tuple(pair.split("=")) for pair in fields.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"data.fields is {fields!r}: write ours=theirs,ours=theirs")
    for ours, theirs in pairs:
        if ours not in FIELDS and not ours.startswith("problem_"):
            choices = ", ".join((*FIELDS, "problem_<code>", "problem_<code>_ok"))
            raise ValueError(f"data.fields is {fields!r}: {ours!r} is none of {choices}")
        if records and not any(theirs in record.fields for record in records):
            have = ", ".join(map(str, records[0].fields))
            raise ValueError(f"data.fields is {fields!r}: {path} has no {theirs!r}; it has {have}")
    return [
        Record(
            record.where,
            record.fields
            | {ours: record.fields[old] for ours, old in pairs if old in record.fields},
        )
        for record in records
    ]


def to_text(name: str, value: object) -> str:
    """A field's value as text without surrounding blanks; raises UnusableValue with the reason."""
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
        raise UnusableValue(f"{name} holds half a character (a lone surrogate)")
    # One spelling of each letter: most tokenizers would tell the others apart.
    return unicodedata.normalize("NFC", value.strip())


def _first(record: Record, names: Sequence[str]) -> str:
    """The text of the first of `names` that the record has."""
    for name in names:
        if name in record.fields:
            return to_text(name, record.fields[name])
    raise UnusableValue(f"{names[0]} is missing")


def _optional(record: Record, names: Sequence[str], needed: bool) -> str:
    """The text of the first of `names` there is; "" if it is absent or blank and not needed."""
    if not needed:
        found = [record.fields[name] for name in names if name in record.fields][:1]
        blank = [x is None or (isinstance(x, str | bytes) and not x.strip()) for x in found]
        if not found or blank[0] or (isinstance(found[0], float) and math.isnan(found[0])):
            return ""
    return _first(record, names)


def _problem(record: Record, codes: Sequence[str]) -> str:
    """The problem in a language that sources may call by any of `codes`."""
    names = [f"problem_{code}" for code in codes] + (["problem"] if "en" in codes else [])
    for name in names:
        flag = record.fields.get(f"{name}_ok")
        flag = True if flag is None else flag  # parquet writes an absent field as null
        accepted = flag.decode() == "true" if isinstance(flag, bytes) else flag
        if not (isinstance(accepted, bool | np.bool_ | np.integer) and accepted == 1):
            raise UnusableValue(f"{name}_ok is not true")
    return _first(record, names)


def _row(
    record: Record, lang: str, codes: Sequence[str], needs: Sequence[str], key: str
) -> problem_row.Row:
    return problem_row.Row(
        id=key,
        problem=_problem(record, codes),
        solution=_optional(record, ("solution",), "solution" in needs),
        answer=_optional(record, ("answer", "Answer"), "answer" in needs),
        lang=lang,
        problem_en=_optional(record, ("problem", "problem_en"), "problem_en" in needs),
        group=_optional(record, ("group", "wording"), "group" in needs),
    )


def _ids(path: str, records: Sequence[Record]) -> list[str]:
    """Each record's `id`, or its number where it has none; all different."""
    seen: dict[str, str] = {}
    for k, record in enumerate(records, start=1):
        key = _optional(record, ("id",), False) or f"row{k}"
        if key in seen:
            raise ValueError(f"{path}: id {key!r} stands in {seen[key]} and in {record.where}")
        seen[key] = record.where
    return list(seen)


def load(
    path: str,
    langs: Sequence[str],
    *,
    missing: str = "error",
    fields: str = "",
    needs: Sequence[str] = ("answer",),
    limit: int = 0,
    registry: Mapping[str, languages.Language] | None = None,
    setting: str = "data.path",
    data_dir: str | None = None,
) -> tuple[list[problem_row.Row], collections.Counter[str]]:
    """Rows of a source in the languages asked for, language after language.

    Args:
      path: see the module's docstring.
      langs: codes (or aliases) of languages.
      missing: "error", or "drop" to leave out records that lack what is needed, and count them.
      fields: other names of a source's fields, "problem=question,answer=final".
      needs: what each row must have besides its problem: of `solution`, `answer`, `problem_en`,
        `group`. Evaluation needs no solution.
      limit: use only the first n records of the source; 0 for all.
      registry: the languages; None for the built-in ones.
      setting: the setting that `path` comes from, for messages.
      data_dir: where TFDS data sets lie; None for TFDS's own default.
    Returns:
      The rows and how many were dropped by reason. With several languages a row's id is
      "<id>/<lang>", since a problem then occurs once per language.
    Raises:
      FileNotFoundError, ValueError: in one sentence with the file, the line or row, and the count.
    """
    registry = languages.load() if registry is None else registry
    codes = [languages.resolve(code, registry) for code in langs]
    if len(set(codes)) != len(codes) or not codes:
        raise ValueError(f"the languages {', '.join(langs)} must be at least one, each once")
    if path.endswith(".tsv") and len(codes) > 1:
        raise ValueError(f"{setting} is {path!r}: a TSV file holds one language, not {langs}")
    records = read(path, lang=codes[0], setting=setting, data_dir=data_dir)
    records = rename_fields(path, records, fields)[: limit or None]
    ids = _ids(path, records)
    rows, dropped, first = [], collections.Counter[str](), {}
    for lang in codes:
        names = languages.names(lang, registry)
        for record, key in zip(records, ids, strict=True):
            key = f"{key}/{lang}" if len(codes) > 1 else key
            try:
                rows.append(_row(record, lang, names, needs, key))
            except UnusableValue as reason:
                dropped[str(reason)] += 1
                first.setdefault(str(reason), record.where)
    _refuse(path, dropped, first, len(rows), missing)
    return rows, dropped


def _refuse(
    path: str, dropped: Mapping[str, int], first: Mapping[str, str], kept: int, missing: str
) -> None:
    """Raises if anything is missing and must not be, or if nothing is left."""
    if missing not in ("error", "drop"):
        raise ValueError(f"data.missing is {missing!r}: the choices are error, drop")
    if dropped and (missing == "error" or not kept):
        reason = next(iter(dropped))
        more = "; ".join(f"{name}: {count}" for name, count in dropped.items())
        total = kept + sum(dropped.values())
        advice = "data.missing=drop leaves them out" if kept else "no row is left"
        raise ValueError(
            f"{path}, {first[reason]}: {reason} (rows concerned, of {total}: {more}; {advice})"
        )
    if not kept:
        raise ValueError(f"{path}: it holds no rows")
