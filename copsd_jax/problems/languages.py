"""The languages of problems and prompts: built-in languages, and additions by the user.

Training, baselines and evaluation use the same registry of languages. A file of languages is a JSON
object that maps codes to languages. Each code is in lower case, and each language has all fields of
`Language` except `code`, and no other fields:

    {"xx": {"name": "...", "aliases": [], "checked_by_speaker": false, "note": "", ...}}

An unknown code raises an error; English never takes the place of an unknown language.
"""

import dataclasses
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from copsd_jax.problems import record_files

BUILT_IN = pathlib.Path(__file__).parent / "languages.json"
BOX = "\\boxed{}"
ANSWER_IS = "The answer is"  # graders search for these English words, whatever the language
_CODE = re.compile(r"[a-z]{2,8}(?:[-_][a-z0-9]{1,8})*")
# No word contains control characters, lone surrogates, or private-use or unassigned code points.
_NO_TEXT = ("Cc", "Cs", "Co", "Cn")
_MARKERS = ("<|", "<think>", "</think>")  # these parts of chat templates are forbidden in all texts


@dataclasses.dataclass(frozen=True)
class Language:
    r"""The wording of prompts in one language; all texts are in Unicode form NFC.

    Attributes:
      code: the language's ISO 639-1 or 639-3 code in lower case, as in COPSD.
      name: the language's name in the language itself.
      english_name: the language's name in English.
      script: the name of the language's script, in English.
      aliases: other codes of the language; data fields and settings may use them too.
      label_problem: the label before the problem, without a colon.
      label_problem_en: the label before the English problem.
      label_solution: the label before the English solution.
      begin_reference: the line before the reference solution.
      end_reference: the line after the reference solution.
      instruction: asks the model to reason step by step and to put the final answer in `\boxed{}`.
      instruction_answer_is: asks the model to end with the English words "The answer is N." instead
        of a box.
      think_prefix: the first words of the model's thinking.
      reason_first: asks the teacher to explain the reference solution without solving the problem.
      transition: says that the solution is understood, and asks for a new derivation, not a copy.
      checked_by_speaker: whether a speaker of the language has checked these texts.
      note: remarks for users of the language; may be empty.
    """

    code: str
    name: str
    english_name: str
    script: str
    aliases: tuple[str, ...]
    label_problem: str
    label_problem_en: str
    label_solution: str
    begin_reference: str
    end_reference: str
    instruction: str
    instruction_answer_is: str
    think_prefix: str
    reason_first: str
    transition: str
    checked_by_speaker: bool
    note: str


FIELDS = tuple(field.name for field in dataclasses.fields(Language) if field.name != "code")
_NOT_TEXT = ("aliases", "checked_by_speaker")
TEXTS = tuple(name for name in FIELDS if name not in _NOT_TEXT)


def load_languages(extra_path: str = "") -> dict[str, Language]:
    """Loads the built-in languages by code; a user's file may add or replace languages.

    Args:
      extra_path: a JSON file in the format that the module's docstring describes; "" for no file.

    Raises:
      FileNotFoundError: there is no file at `extra_path`.
      ValueError: a language is invalid; the message names the file, the language and the field.
    """
    registry = _read_languages_file(BUILT_IN)
    if extra_path:
        registry |= _read_languages_file(pathlib.Path(os.path.expanduser(extra_path)))
    _check_aliases(registry, extra_path or str(BUILT_IN))
    return registry


def resolve_code(code: str, registry: Mapping[str, Language]) -> str:
    """Resolves a code or alias, in upper or lower case, to the registry's code.

    Raises:
      ValueError: the code is unknown; the message lists the known codes.
    """
    wanted = code.strip().lower()
    for known, language in registry.items():
        if wanted == known or wanted in language.aliases:
            return known
    every = registry.values()
    codes = (f"{x.code} ({', '.join(x.aliases)})" if x.aliases else x.code for x in every)
    raise ValueError(
        f"unknown language {code!r}: the choices are {', '.join(codes)}; "
        "a file named by languages_file adds languages"
    )


def _read_languages_file(path: pathlib.Path) -> dict[str, Language]:
    """Reads the languages in one file, and checks each language."""
    if not path.is_file():
        raise FileNotFoundError(f"languages_file is '{path}': there is no such file")
    try:
        content = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=record_files.build_object
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except ValueError as error:  # a repeated key, or a number with too many digits
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: must be a JSON object that maps language codes to fields")
    return {
        code: _parse_language(f"{path}: language {code!r}", code, v) for code, v in content.items()
    }


def _parse_language(where: str, code: str, fields: Any) -> Language:
    """Checks one entry and returns its `Language`; each error message begins with `where`."""
    if not _CODE.fullmatch(code):
        raise ValueError(f"{where}: a code must look like sw or zh_hant")
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be an object with the fields {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS if name not in fields]:
        raise ValueError(f"{where}: lacks the field {', '.join(missing)}")
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; fields are {', '.join(FIELDS)}")
    for name in TEXTS:
        _check_text(f"{where}, field {name!r}", fields[name], may_be_empty=name == "note")
    _check_meaning(where, fields)
    return Language(code=code, **{**fields, "aliases": tuple(fields["aliases"])})


def _check_text(where: str, text: Any, may_be_empty: bool) -> None:
    if not isinstance(text, str):
        kind = {list: "a list", dict: "an object"}.get(type(text)) or json.dumps(text)[:40]
        raise ValueError(f"{where}: must be text, not {kind}")
    if not text.strip() and not (may_be_empty and not text):
        raise ValueError(f"{where}: is empty")
    if text != text.strip():
        raise ValueError(f"{where}: begins or ends with white space")
    if bad := [c for c in text if c != "\n" and unicodedata.category(c) in _NO_TEXT]:
        raise ValueError(f"{where}: contains the character U+{ord(bad[0]):04X}, which is not text")
    if not unicodedata.is_normalized("NFC", text):
        raise ValueError(f"{where}: is not in Unicode form NFC")
    if markers := [marker for marker in _MARKERS if marker in text]:
        raise ValueError(f"{where}: contains {markers[0]!r}, which belongs to chat templates")


def _check_meaning(where: str, fields: dict[str, Any]) -> None:
    """Checks the fields that prompts and graders rely on."""
    if not isinstance(fields["checked_by_speaker"], bool):
        raise ValueError(f"{where}, field 'checked_by_speaker': must be true or false")
    aliases = fields["aliases"]
    codes = isinstance(aliases, list) and all(isinstance(x, str) for x in aliases)
    if not codes or not all(map(_CODE.fullmatch, aliases)):
        raise ValueError(f"{where}, field 'aliases': must be a list of lower-case codes")
    if fields["instruction"].count(BOX) != 1:
        raise ValueError(f"{where}, field 'instruction': must contain {BOX} once")
    if ANSWER_IS not in fields["instruction_answer_is"]:
        raise ValueError(f"{where}, field 'instruction_answer_is': must contain {ANSWER_IS!r}")
    if fields["begin_reference"] == fields["end_reference"]:
        raise ValueError(f"{where}, field 'end_reference': equals 'begin_reference'")


def _check_aliases(registry: Mapping[str, Language], path: str) -> None:
    """Refuses an alias that stands for two languages; error messages begin with `path`."""
    owner = {code: code for code in registry}
    for code, language in registry.items():
        for alias in language.aliases:
            if alias in owner:
                raise ValueError(
                    f"{path}: {alias!r} is an alias of {code!r} and also means {owner[alias]!r}"
                )
            owner[alias] = code
