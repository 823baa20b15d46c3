"""Experiment cards, and the arguments of the command line that change their settings.

A card is a Python file with a function `get_config(preset)`. This function calls `default()`,
changes some settings of the result, and returns the changed config. Every error is one sentence
that names the card or the setting.
"""

import ast
import contextlib
import difflib
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict

from copsd_jax.config import settings as config_lib

FLAGS = ("config", "workdir", "init_from", "dry_run", "dry_run_json", "search")
_PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}
_SHOWN = 300  # maximum number of characters of an error in a card


class Arguments(NamedTuple):
    """The arguments of a command line.

    Attributes:
      card: the value of --config; "" if it is missing.
      others: all other arguments, written as "--name=value", or as "--name" for a switch.
    """

    card: str
    others: list[str]


class Card(NamedTuple):
    """A card, described for `--help`.

    Attributes:
      summary: the first sentences of the card's docstring; "" if there is none.
      presets: the description of each preset, or the error of a preset that fails.
      config: the settings that the card returns for the requested preset.
    """

    summary: str
    presets: dict[str, str]
    config: config_lib.Config


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Splits a command line; checks the names of flags and settings, and the types of values.

    If a setting that is not a list occurs twice, the last value counts. Therefore, a user can
    override the settings in a script by appending arguments.

    Args:
      argv: the command line; the first element is the name of the program.

    Raises:
      ValueError: a name is unknown, a value is missing or has the wrong type, a flag occurs twice,
        or a setting that is a list occurs twice.
    """
    found: dict[str, str] = {}
    words = iter(argv[1:])
    for word in words:
        flag, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not flag:
            raise ValueError(f"unexpected argument {word!r}: write settings as --config.name=value")
        name = _check_setting_or_flag(flag)
        if name in found and (_is_list(name) or not name.startswith("config.")):
            advice = "; write several values with commas" if _is_list(name) else ""
            raise ValueError(f"--{name} occurs twice: keep one of the two{advice}")
        switch = name == "search" or isinstance(_default_of(name), bool)
        if not equals and not switch:
            word = next(words, None)
            if word is None or _begins_with_flag(word):
                raise ValueError(f"--{name} needs a value: write --{name}=VALUE")
            value, equals = word, "="
        if equals and name == "search" and value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--search is {value!r}: it must be True or False")
        if equals and name.startswith("config."):
            _check_setting_text(name.removeprefix("config."), value)
        found[name] = f"--{flag}{equals}{value}"
    card = found.pop("config", "").removeprefix("--config=")
    return Arguments(card, list(found.values()))


def _check_setting_or_flag(flag: str) -> str:
    """Returns the name of a flag or setting, without the "no" of a negated switch."""
    for name in (flag, flag.removeprefix("no")):
        setting = name.removeprefix("config.")
        if name in FLAGS and (name == flag or name == "search"):
            return name
        known = setting != name and setting in config_lib.SETTINGS
        if known and (name == flag or isinstance(_default_of(name), bool)):
            return name
    flag = flag if flag.isprintable() else repr(flag)
    if flag.startswith("config."):
        raise ValueError(config_lib.unknown_setting(flag.removeprefix("config.")))
    known = ", ".join(f"--{name}" for name in FLAGS)
    rule = f"the flags are {known}, --help, and --config.name for settings"
    raise ValueError(f"--{flag} is no flag: {rule}")


def _begins_with_flag(word: str) -> bool:
    """Tells whether a word is another flag or setting, and therefore not the value of one."""
    if word.startswith("--"):
        with contextlib.suppress(ValueError):
            return bool(_check_setting_or_flag(word[2:].partition("=")[0]))
    return False


def _default_of(name: str) -> Any:
    setting = config_lib.SETTINGS.get(name.removeprefix("config."))
    return setting.default if setting and name.startswith("config.") else None


def _is_list(name: str) -> bool:
    return isinstance(_default_of(name), tuple)


def _check_setting_text(name: str, text: str) -> None:
    """Refuses a text that is not the number, switch or list that the setting needs."""
    if _is_list(f"config.{name}"):
        value: Any = ()
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
        # ml_collections would turn bytes, a dict or a set into a list of bytes, keys or elements.
        if isinstance(value, bytes | dict | set):
            raise ValueError(config_lib.describe_type_fault(name, text))
    parser = _PARSERS.get(type(config_lib.SETTINGS[name].default))
    try:
        if parser:
            parser.parse(text)
    except ValueError as error:
        raise ValueError(config_lib.describe_type_fault(name, text)) from error


def bundled_cards() -> dict[str, pathlib.Path]:
    """Returns the cards that come with the program, by name.

    An installed package contains the cards; a checkout has them beside the package.
    """
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    folder = next(filter(pathlib.Path.is_dir, folders), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if folder != package}


def find_card(argument: str) -> str:
    """Returns the file of a card.

    Args:
      argument: as for `load_card`; a file has precedence over a bundled card of the same name.

    Raises:
      FileNotFoundError: there is neither such a file nor such a bundled card.
      ValueError: the file is no Python file.
    """
    file = os.path.expanduser(argument).partition(":")[0]
    if not pathlib.Path(file).is_file():
        bundled = bundled_cards()
        if file not in bundled:
            known = ", ".join(bundled)
            raise FileNotFoundError(
                f"--config={file!r}: there is no such file; the cards that have a name are {known}"
            )
        return str(bundled[file])
    if not file.endswith(".py"):
        raise ValueError(f"--config={file!r}: a card is a Python file, such as configs/opsd.py")
    return file


def load_card(argument: str) -> config_lib.Config:
    """Loads the settings of an experiment card.

    Args:
      argument: the path of the card, or the name of a bundled card; perhaps followed by a colon and
        the name of a preset.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no card, or the card fails; the message names the file and the line.
    """
    if not argument:
        raise ValueError(
            "--config is missing: write, for example, --config=opsd:tiny (--help shows the cards)"
        )
    file, (_, colon, preset) = find_card(argument), argument.partition(":")
    module: Any = _run_card(argument, file)
    with _explain_failure(argument, file):
        config = module.get_config(preset) if colon else module.get_config()
    return _check_settings_of(argument, config)


def describe_card(argument: str) -> Card:
    """Loads a card, and describes the card and its presets.

    Args:
      argument: as for `load_card`.

    Raises:
      FileNotFoundError, ValueError: as for `load_card`.
    """
    config = load_card(argument)
    name = argument.partition(":")[0]
    module = _run_card(argument, find_card(name))
    presets = {}
    # By convention, a card lists its presets in a dict; no rule forces a user's card to do so.
    table = getattr(module, "PRESETS", {})
    for preset in table if isinstance(table, Mapping) else ():
        try:
            presets[preset] = load_card(f"{name}:{preset}").description
        except ValueError as error:
            presets[preset] = str(error)
    summary = (module.__doc__ or "").strip().split("\n\n")[0]
    return Card(" ".join(summary.split()), presets, config)


def _run_card(argument: str, file: str) -> Any:
    """Runs a card's file, and returns its module."""
    with _explain_failure(argument, file):
        spec: Any = importlib.util.spec_from_file_location("experiment_card", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # a dataclass in a card looks up its module here
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _explain_failure(argument: str, file: str) -> Iterator[None]:
    """Turns every exception of a card into a ValueError of one sentence."""
    try:
        yield
    # A card is the user's program, which may raise any exception or call sys.exit.
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config={argument!r}{_describe_card_failure(file, error)}") from error


def _describe_card_failure(file: str, error: BaseException) -> str:
    """Describes the failure of a card: the line in the card, and the error."""
    if isinstance(error, SyntaxError):
        where = f", line {error.lineno}" if error.lineno else ""
        return f"{where}: the file is not valid Python ({error.msg})"
    frames = traceback.extract_tb(error.__traceback__)
    name = pathlib.Path(file).name
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).name == name]
    where = f", line {lines[-1]}" if lines else ""
    text = " ".join(str(error).split())
    if frames[-1].filename.endswith("config_dict.py") and isinstance(error, AttributeError):
        return f"{where}: {_describe_unknown_setting(text)}"
    # ConfigDict repeats the value and its type in the form of Python's classes.
    if wrong := re.match(r"Could not override field '(\w+)'.*casted to type <class '(\w+)'>", text):
        return f"{where}: the value of {wrong[1]!r} must have the type {wrong[2]}"
    kind = "" if text and isinstance(error, ValueError) else type(error).__name__
    return f"{where}: {': '.join(filter(None, (kind, text[:_SHOWN])))}"


def _describe_unknown_setting(text: str) -> str:
    """Describes the error of ConfigDict about a name that the settings do not have."""
    name = re.search(r"\w+", text.removeprefix("'Key"))
    word = name[0] if name else ""
    every = dict.fromkeys(part for full in config_lib.SETTINGS for part in full.split("."))
    near = difflib.get_close_matches(word, every)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help all lists all settings"
    return f"the settings have no {word!r}: {hint}"


def _check_settings_of(argument: str, config: Any) -> config_lib.Config:
    """Returns the settings of a card as a new locked config with the types of the defaults."""
    if not isinstance(config, config_dict.ConfigDict):
        kind = type(config).__name__
        rule = "get_config must return the config that copsd_jax.config.default() gives"
        raise ValueError(f"--config={argument!r}: {rule}, but it returned {kind}")
    values = config_lib.flat(config)
    unknown = [name for name in values if name not in config_lib.SETTINGS]
    if unknown:
        raise ValueError(f"--config={argument!r}: {config_lib.unknown_setting(unknown[0])}")
    if missing := [name for name in config_lib.SETTINGS if name not in values]:
        rule = "start from copsd_jax.config.default()"
        raise ValueError(f"--config={argument!r}: the card lacks the setting {missing[0]}; {rule}")
    result = config_lib.default()
    try:
        config_lib.assign(result, values)
    except ValueError as error:
        raise ValueError(f"--config={argument!r}: {error}") from error
    return result
