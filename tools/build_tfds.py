"""Converts a file of problems into a TFDS data set that can be read without TensorFlow.

    python tools/build_tfds.py SOURCE NAME DATA_DIR [--fields=problem=question,answer=final]

To read the data set, set TFDS_DATA_DIR to DATA_DIR in the environment, and use
`--config.data.path=tfds:NAME/train`.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from copsd_jax.problems import field_values, record_fields, record_files


def build_tfds(
    source_path: str,
    name: str,
    data_dir: str,
    *,
    fields: str = "",
    split: str = "train",
    version: str = "1.0.0",
) -> pathlib.Path:
    """Converts a source into a TFDS data set in ArrayRecord files.

    The fields used by rows become text features; an absent field becomes an empty text. Other
    fields are left out. `tfds:NAME/SPLIT` reads the data set in the same order.

    Args:
      source_path: a JSONL, JSON, parquet or TSV file.
      name: the name of the data set.
      data_dir: the folder of all TFDS data sets.
      fields: other names of fields, as in the setting data.fields.
      split: the name of the split.
      version: the version of the data set.

    Returns:
      The folder of this version of the data set.

    Raises:
      FileExistsError: the version already exists.
      ValueError: the source cannot be read, a name is wrong, or a field is not a text or a number.
    """
    import tensorflow_datasets as tfds

    for flag, value, form in (
        ("NAME", name, r"[a-z][a-z0-9_]*"),
        ("--split", split, r"[a-z][a-z0-9_]*"),
        ("--version", version, r"\d{1,9}\.\d{1,9}\.\d{1,9}"),
    ):
        if not re.fullmatch(form, value, re.ASCII):
            like = "1.0.0" if flag == "--version" else "my_problems"
            raise ValueError(f"{flag} is {value!r}: write a value such as {like}")
    folder = pathlib.Path(data_dir) / name / version
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another version or remove it")
    records = record_fields.rename_fields(
        source_path, record_files.read_records(source_path, setting="SOURCE"), fields, "--fields"
    )
    found = {column for record in records for column in record.fields}
    columns = sorted(c for c in found if c in record_fields.FIELDS or c.startswith("problem_"))
    if not columns:
        raise ValueError(f"{source_path}: no record has a field of problems; --fields maps names")
    examples = [_example(source_path, record, columns) for record in records]

    # TFDS refuses the class name Builder outside a package.
    class ProblemsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None  # otherwise TFDS looks for the source file, with a package not installed

        def _info(self):
            features = tfds.features.FeaturesDict({c: tfds.features.Text() for c in columns})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    ProblemsBuilder.name = name
    ProblemsBuilder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return folder


def _example(path: str, record: record_files.Record, columns: Sequence[str]) -> dict[str, str]:
    """Returns a record's fields as texts; an absent field is ""."""
    out = dict.fromkeys(columns, "")
    for column in columns:
        value = record.fields.get(column)
        if column.endswith("_ok") and not field_values.is_blank(value):
            out[column] = "true" if field_values.is_true(value) else "false"
        elif not field_values.is_blank(value):
            try:
                out[column] = field_values.convert_problem_field(column, value)
            except field_values.UnusableValue as error:
                raise ValueError(f"{path}, {record.where}: {error}") from error
    return out


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="a JSONL, JSON, parquet or TSV file")
    parser.add_argument("name", help="the name of the data set")
    parser.add_argument("data_dir", help="the folder of all TFDS data sets")
    parser.add_argument("--fields", default="", help="other names of fields, as in data.fields")
    parser.add_argument("--split", default="train")
    parser.add_argument("--version", default="1.0.0")
    args = parser.parse_args(argv)
    try:
        folder = build_tfds(
            args.source, args.name, args.data_dir,
            fields=args.fields, split=args.split, version=args.version,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
