"""Reads the records of a source: JSONL, a JSON list, parquet, CSV, TSV, or a TFDS or hub data set.

A value keeps its type; `sources` converts values to text. Every error is one sentence that names
the file and the line or row.
"""

import collections
import csv
import decimal
import importlib
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from copsd_jax.problems import bundled, hub_datasets, source_files

NAMED = ("bundled:", "tfds:", "hf:")  # the sources that are no files
DIGITS = 4300  # maximum number of digits of an integer; Python refuses to convert longer texts
_COLUMN = (
    "(?:[a-z]+[_ ])?"
    "(?:id|question|problem|prompt|query|input|text|answer|solution|gold|target|output|label)"
    "(?:[_ ][a-z]+)?"
)
# Matches two column names, or a language code and a column name, with a tab between them.
_HEADER = re.compile(rf"(?:[a-z]{{2,3}}|{_COLUMN})\t{_COLUMN}", re.IGNORECASE)


class Record(NamedTuple):
    """A record and its position in the source, such as "line 7" or "row 7" (counted from 1)."""

    where: str
    fields: dict[str, Any]


class Unread(NamedTuple):
    """A parquet value that has no counterpart in Python, such as a date after the year 9999."""

    type: str


class Unusable(NamedTuple):
    """A value from which no text can be made, such as a conversation with two questions."""

    reason: str


def _describe_record_error(error: BaseException) -> str:
    """Describes an error of another library in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"


def list_record_fields(names: Iterable[object]) -> str:
    """Lists names of fields on one line; a long list is shortened."""
    every = [str(name) if str(name).isprintable() else repr(name) for name in names]
    return ", ".join([name[:60] for name in every[:20]] + (["…"] if len(every) > 20 else []))


def read_records(path: str, *, lang: str = "en", setting: str = "data.path") -> list[Record]:
    """Reads all records of a source.

    Args:
      path: a source, in one of the forms that the docstring of `sources` describes.
      lang: the code of the language in which the questions of a TSV file are written.
      setting: the name of the setting that gives `path`, for error messages.

    Raises:
      OSError: there is no such file or data set, or the file cannot be read.
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
    if path.startswith("hf:"):
        return [Record(f"row {k}", x) for k, x in enumerate(hub_datasets.read(path, setting), 1)]
    shards = source_files.find_shards(path, setting)
    out = []
    for shard in shards:
        raw = source_files.read_shard(shard, setting)
        found = _PARSERS[shard.kind](shard.name, raw, f"problem_{lang}")
        if len(shards) > 1:
            found = [Record(f"{shard.path.name} {where}", fields) for where, fields in found]
        out += found
    return out


# ------------------------------------------------------------------------------------------- text


def _decode_source_text(path: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: the text is not UTF-8") from error


def _read_json(path: str, raw: bytes) -> list[Record]:
    """Reads a JSON list of objects, or a file with one JSON object per line."""
    text = _decode_source_text(path, raw)
    if text.lstrip()[:1] == "[":
        rows = _parse_json(path, 1, text, whole=True)
        return [_record(path, f"row {k}", row) for k, row in enumerate(rows, 1)]
    out = []
    # splitlines() is not used: it also splits at U+2028, which JSON strings may contain.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                out.append(_record(path, f"line {line}", _parse_json(path, line, content)))
            except ValueError:
                if not out and "\n" in text.strip() and _is_json_record(text):
                    raise ValueError(
                        f"{path}: the file is one JSON object over several lines; write a JSON "
                        "list of objects, or one object per line"
                    ) from None
                raise
    return out


def _record(path: str, where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{path}, {where}: expected a JSON object, found {type(value).__name__}")
    return Record(where, value)


def _parse_json(path: str, line: int, text: str, whole: bool = False) -> Any:
    """Parses one JSON value; `whole` says that the text is the whole file."""
    where = path if whole else f"{path}, line {line}"
    try:
        return json.loads(
            text, object_pairs_hook=build_object, parse_int=_read_integer,
            parse_float=_read_record_decimal,
        )  # fmt: skip
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(f"{at}: broken JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_json_record(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; refuses a repeated key, because `json` would drop an earlier value.

    Raises:
      ValueError: a key occurs twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} occurs twice in one object")
    return result


def _read_integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer has more than {DIGITS:,} digits; write it as text")
    return int(digits)


def _read_record_decimal(digits: str) -> float | decimal.Decimal:
    """Returns a number as a float, or as a Decimal if a float would change its digits."""
    value = float(digits)
    if math.isinf(value):
        return value
    try:
        exact = decimal.Decimal(digits)
    except ArithmeticError as error:
        raise ValueError("a number has too large an exponent; write it as text") from error
    return value if decimal.Decimal(repr(value)) == exact else exact


def _read_csv(path: str, raw: bytes) -> list[Record]:
    """Reads comma-separated cells below a header row; quoted cells may have line breaks."""
    text = _decode_source_text(path, raw)
    # The default of 131,072 characters is less than the length of some solutions.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    out = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: broken CSV ({error})") from error
        if cells is None:
            return out
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = [cell.strip() or f"column {k}" for k, cell in enumerate(cells, 1)]
            _check_csv_header(path, line, names)
        elif len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: expected {len(names)} cells as in the header, found "
                f"{len(cells)}"
            )
        else:
            out.append(Record(f"line {line}", dict(zip(names, cells, strict=True))))


def _check_csv_header(path: str, line: int, names: list[str]) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, line {line}: the column {twice[0][:60]!r} occurs twice")
    other = next((mark for mark in (";", "\t", "|") if mark in names[0]), "")
    if len(names) == 1 and other:
        raise ValueError(
            f"{path}, line {line}: the header {names[0][:60]!r} has no comma; separate the cells "
            f"of a CSV file with commas, not with {other!r}"
        )


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
        if not out and _HEADER.fullmatch("\t".join(cell.strip() for cell in cells)):
            raise ValueError(
                f"{path}, line {k}: {' TAB '.join(cells)} is a header; remove this line, because a "
                "TSV file has no header"
            )
        out.append(Record(f"line {k}", {field: cells[0], "answer": cells[1]}))
    return out


# ------------------------------------------------------------------------------- parquet and TFDS


def _read_parquet(path: str, raw: bytes) -> list[Record]:
    # pyarrow is imported lazily: the import is slow, and most runs read no parquet file.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = _describe_record_error(error)
        raise ValueError(f"{path}: not a parquet file that can be read ({reason})") from error
    twice = [name for name, n in collections.Counter(table.column_names).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: the column {twice[0]!r} occurs twice")
    columns = [_list_values(column) for column in table.columns]
    names, rows = table.column_names, zip(*columns, strict=True)
    return [Record(f"row {k}", dict(zip(names, row, strict=True))) for k, row in enumerate(rows, 1)]


def _list_values(column: Any) -> list[Any]:
    """Returns the values of a column; a value without counterpart in Python becomes `Unread`."""
    import pyarrow

    errors = (pyarrow.ArrowException, ValueError, OverflowError)
    try:
        return column.to_pylist()
    except errors:
        pass
    out = []
    for value in column:
        try:
            out.append(value.as_py())
        except errors:
            out.append(Unread(str(column.type)))
    return out


def _find_tfds_folder(setting: str, path: str, name: str) -> pathlib.Path:
    """Returns the folder of the TFDS data set NAME[:VERSION]; the default is the newest version."""
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.utils import version as version_lib

    name, _, version = name.partition(":")
    root = pathlib.Path(os.path.expanduser(constants.DATA_DIR)) / name
    every = map(str, version_lib.list_all_versions(root)) if root.is_dir() else ()
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
    folder = _find_tfds_folder(setting, path, name)
    try:
        builder = tfds.builder_from_directory(folder)
        splits, file_format = list(builder.info.splits), builder.info.file_format
    # TFDS, protobuf and ArrayRecord raise errors of many types about damaged files.
    except Exception as error:
        raise _refuse_record_folder(setting, path, folder, error) from error
    if split.partition("[")[0] not in splits:
        choices = ", ".join(splits)
        raise ValueError(f"{setting} is {path!r}: no split {split!r}; the choices are {choices}")
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = getattr(file_format, "value", "another format")
        raise ValueError(
            f"{setting} is {path!r}: reading the format {found} needs TensorFlow; "
            "prepare the data set with file_format='array_record'"
        )
    try:
        _check_shards(builder.info.splits[split.partition("[")[0]])
        source: Any = builder.as_data_source  # a decorator hides all arguments from type checkers
        return [read_example(k, example) for k, example in enumerate(source(split), start=1)]
    except Exception as error:
        raise _refuse_record_folder(setting, path, folder, error) from error


def _check_shards(split: Any) -> None:
    """Refuses a shard that lacks records; TFDS would read empty examples in their place."""
    # The module is compiled, so type checkers do not know it.
    module: Any = importlib.import_module("array_record.python.array_record_module")
    for file, count in zip(split.filepaths, split.shard_lengths, strict=True):
        found = module.ArrayRecordReader(str(file)).num_records() if count else 0
        if found != count:
            raise ValueError(f"{file} has {found} of {count} records")


def _refuse_record_folder(
    setting: str, path: str, folder: pathlib.Path, error: Exception
) -> ValueError:
    reason = f"{type(error).__name__}: {_describe_record_error(error)}"
    return ValueError(f"{setting} is {path!r}: {folder} cannot be read ({reason})")


def read_example(k: int, example: dict[str, Any]) -> Record:
    """Converts the k-th example of a TFDS data set to a record.

    Every example has every feature, so an absent field is stored as an empty text.
    """
    absent = {key for key, v in example.items() if isinstance(v, bytes) and not v}
    return Record(f"row {k}", {key: v for key, v in example.items() if key not in absent})


_PARSERS: dict[str, Callable[[str, bytes, str], list[Record]]] = {
    ".jsonl": lambda path, raw, field: _read_json(path, raw),
    ".json": lambda path, raw, field: _read_json(path, raw),
    ".parquet": lambda path, raw, field: _read_parquet(path, raw),
    ".tsv": _read_tsv,
    ".csv": lambda path, raw, field: _read_csv(path, raw),
}
