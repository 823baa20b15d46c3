"""Turns a file of problems into a TFDS data set that needs no TensorFlow to be read.

    python tools/build_tfds.py SOURCE NAME DATA_DIR [--fields=problem=question,answer=final]

Set the environment variable TFDS_DATA_DIR to DATA_DIR and use `--config.data.path=tfds:NAME/train`.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from copsd_jax.problems import sources


def build_tfds(
    source_path: str,
    name: str,
    data_dir: str,
    *,
    fields: str = "",
    split: str = "train",
    version: str = "1.0.0",
) -> pathlib.Path:
    """Turns a source into a TFDS data set in ArrayRecord, readable without TensorFlow.

    The fields that rows are made of become text features, an absent one an empty text; others
    are left out. `tfds:NAME/SPLIT` with the same `data_dir` reads it back, in the same order.

    Returns:
      The folder of the data set's version.
    Raises:
      FileExistsError: the version is there already.
      ValueError: the source cannot be read, or a field holds no text, number or boolean.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(data_dir) / name / version
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another version or remove it")
    records = sources.rename_fields(
        source_path, sources.read_records(source_path, setting="source_path"), fields
    )
    found = {column for record in records for column in record.fields}
    columns = sorted(c for c in found if c in sources.FIELDS or c.startswith("problem_"))
    examples = [_example(source_path, record, columns) for record in records]

    # TFDS refuses the class name Builder outside a package.
    class ProblemsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None  # or it looks for the class's file, by a package that pip leaves out

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


def _example(path: str, record: sources.Record, columns: Sequence[str]) -> dict[str, str]:
    """A record's fields as texts, "" for an absent one."""
    out = dict.fromkeys(columns, "")
    for column in columns:
        value = record.fields.get(column)
        if isinstance(value, bool):
            out[column] = "true" if value else "false"
        elif value is not None and value != "":
            try:
                out[column] = sources.convert_to_text(column, value)
            except sources.UnusableValue as error:
                raise ValueError(f"{path}, {record.where}: {error}") from error
    return out


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="a JSONL, JSON, parquet or TSV file")
    parser.add_argument("name", help="the name of the data set")
    parser.add_argument("data_dir", help="the folder that holds TFDS data sets")
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
