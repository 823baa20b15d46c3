"""Readers of the files of evaluations: W/eval/step_NNNNNN.json and step_NNNNNN.partial.jsonl."""

import pathlib

from copsd_jax.runtime import storage

# The forms of the files; see `storage.check_form`.
_SAMPLE = {"answer": (str, type(None)), "correct": bool, "truncated": bool}
_RECORD = {"id": str, "lang": str, "group": str, "gold": str, "problem": str, "samples": [_SAMPLE]}
_EVALUATION = {"step": int, "scores": dict, "problems": [_RECORD]}
_COMPLETION = {"index": int, "id": str, "ids": [int], "finish": str}


def read_evaluation(path: pathlib.Path) -> dict:
    """Reads the result of an evaluation.

    Raises:
      ValueError: the file does not contain a result; the message names the file and the line.
    """
    result = storage.read_object(path)
    storage.check_form(result, _EVALUATION, f"{path}")
    for number, record in enumerate(result["problems"]):
        if not record["samples"]:
            raise ValueError(f"{path} has problems[{number}] without samples")
    return result


def read_partial(path: pathlib.Path) -> tuple[list[dict], list[bytes]]:
    """Reads the completions of an evaluation that was stopped.

    Returns:
      The objects and the bytes of the lines; see `storage.read_lines`. The first object describes
      the evaluation.

    Raises:
      ValueError: a line is damaged; the message names the file and the line.
      StorageError: the file cannot be read.
    """
    try:
        rows, lines = storage.read_lines(path, {})
        for number, row in enumerate(rows[1:], 2):
            storage.check_form(row, _COMPLETION, f"{path} line {number}")
            if not all(0 <= token < 2**31 for token in row["ids"]):
                raise ValueError(f"{path} line {number} has numbers in 'ids' that are no token ids")
    except ValueError as error:
        advice = "remove this file; its completions are drawn again when the step is evaluated"
        raise ValueError(f"{error}: {advice}") from error
    return rows, lines


def check_partials(folder: pathlib.Path) -> None:
    """Checks that the stopped evaluations in a folder can be continued.

    Raises:
      ValueError: a file is damaged; the message names the file and the line.
      StorageError: a file cannot be read.
    """
    for path in sorted(folder.glob("step_*.partial.jsonl")):
        read_partial(path)
