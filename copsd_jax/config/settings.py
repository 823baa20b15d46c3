"""All settings of a run: the default config, their descriptions, and the retired settings.

A config file under `configs/` calls `default()`, changes some settings for its experiment, and
returns the result. `main` applies the overrides from the command line (`--config.train.steps=20`).
`setting_rules` then checks the config. Each setting is declared once, in `setting_list`.
"""

import difflib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from copsd_jax.config import methods, setting_list
from copsd_jax.config.declaration import LARGEST, Choices, Condition, ListedBy, Range

# A locked ml_collections.ConfigDict. Type checkers do not know the attributes of a ConfigDict.
Config = Any

# The entries of the package's tables. The outer key is the setting that chooses an entry, and the
# inner key is the name of the entry. Each inner value lists the settings that the entry reads.
# `Tables` is None if the tables are not imported.
Tables = Mapping[str, Mapping[str, Sequence[str]]] | None

SETTINGS = setting_list.SETTINGS

# The names of settings that no longer exist, each with the value that switched the setting off. A
# saved config may contain a retired setting only with this value.
RETIRED: dict[str, object] = {"loss.skip_below": 0.0}

# The former defaults of settings whose default has changed. A run that did not record its defaults
# began with these former defaults. Newer runs record every default in run.json.
FORMER_DEFAULTS: dict[str, object] = {
    "loss.norm": "micro_token_mean",
    "train.min_grad_norm": 0.0,
}


def default() -> Config:
    """Returns a locked ConfigDict that contains the default of every setting."""
    config: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        section, _, key = name.rpartition(".")
        holder = config.setdefault(section, {}) if section else config
        holder[key] = setting.default
    return config_dict.ConfigDict(config).lock()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested config as a flat dict in the same order: `{"train.steps": 100, ...}`."""
    out = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping | config_dict.ConfigDict)
        out |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out


def assign(config: Config, values: Mapping[str, Any]) -> None:
    """Sets settings of a config in place; lists from JSON become tuples.

    Args:
      config: the config.
      values: the values by the settings' full names.

    Raises:
      ValueError: a setting is unknown, or a value has the wrong type.
    """
    for name, value in values.items():
        if name not in SETTINGS:
            raise ValueError(unknown_setting(str(name)))
        section, _, key = name.rpartition(".")
        node = config[section] if section else config
        node[key] = _convert_type(name, value)


# The settings that are lists of words.
_WORDS = ("data.lang", "eval.lang", "lora.targets")
# Maps the type of a default to the accepted types of a value, in words and as classes.
_TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (numbers.Integral,)),
    float: ("a number", (numbers.Real,)),
    str: ("text", (str,)),
    tuple: ("a list of values", (tuple, list)),
}


def _convert_type(name: str, value: Any) -> Any:
    """Returns a value in the type of the setting's default."""
    kind = type(SETTINGS[name].default)
    if not isinstance(value, _TYPES[kind][1]) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(describe_type_fault(name, value))
    try:
        converted: Any = kind(value)
    except OverflowError as error:  # a whole number that is larger than any float
        raise ValueError(describe_type_fault(name, value)) from error
    if name in _WORDS:
        _check_words(name, converted)
    return converted


def check_saved(values: Mapping[str, Any]) -> None:
    """Checks the types and ranges of the settings among saved values; ignores other names.

    Raises:
      ValueError: a value has the wrong type or range; the message names the setting.
    """
    for name in values.keys() & SETTINGS.keys():
        check_range(name, _convert_type(name, values[name]))


def check_range(name: str, value: Any) -> None:
    """Checks that a value is in its setting's range; a setting with choices has no range.

    Raises:
      ValueError: the value is outside the range; the message names the setting and the range.
    """
    allowed = SETTINGS[name].allowed
    ranged = allowed if isinstance(allowed, Range) else None
    if ranged and not ranged.holds(value):
        raise ValueError(f"{name} is {show(value)}: it must be {ranged.words}")
    largest = ranged.largest if ranged else LARGEST
    if isinstance(value, int) and value > largest:
        raise ValueError(f"{name} is {show(value)}: it must be at most {largest}")


def describe_type_fault(name: str, value: object) -> str:
    """Returns an error message for a value of the wrong type; names the needed type and range."""
    setting = SETTINGS[name]
    words = _TYPES[type(setting.default)][0]
    also = f" ({setting.allowed.words})" if isinstance(setting.allowed, Range) else ""
    return f"{name} is {show(value)}: it must be {words}{also}"


def show(value: object) -> str:
    """Returns a value as Python writes it; a long value is shortened."""
    shown = repr(value)
    return shown if len(shown) <= 120 else f"{shown[:120]}…"


def spell_count(number: int, noun: str) -> str:
    """Returns a number with its noun in singular or plural, such as "1 step" or "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def completions_per_step(config: Config) -> int:
    """Returns the number of completions per step: problems x samples per problem."""
    return config.train.batch * config.rollout.per_prompt


def traits(config: Config) -> methods.Method:
    """Returns the traits of the method that the config chooses."""
    return methods.METHODS[config.method]


def pick(section: Config, names: str) -> dict[str, Any]:
    """Returns the settings of a section that `names` lists; spaces separate the names."""
    return {name: section[name] for name in names.split()}


def preset(table: Mapping[str, Callable], name: str, default_name: str) -> Callable:
    """Returns the function of a preset from a table of presets.

    Args:
      table: the function of each preset, by the preset's name.
      name: the name of the preset; "" means the default preset.
      default_name: the name of the default preset.

    Raises:
      ValueError: the name is unknown; the message lists the choices.
    """
    if (name or default_name) not in table:
        raise ValueError(f"preset is {name!r}: the choices are {', '.join(table)}")
    return table[name or default_name]


def split_lists(config: Config) -> None:
    """Splits the config's lists of words at commas, in place: ("sw,fr",) becomes ("sw", "fr").

    Raises:
      ValueError: an item is not text; for example, 1e999 on the command line is read as a number.
    """
    for full in _WORDS:
        section, _, name = full.partition(".")
        _check_words(full, config[section][name])
        parts = (part for item in config[section][name] for part in item.split(","))
        config[section][name] = tuple(filter(None, parts))


def _check_words(name: str, items: Iterable[Any]) -> None:
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{name} has {show(item)}: it must be a list of words")


# ------------------------------------------------------------------- unknown and retired settings


def unknown_setting(name: str) -> str:
    """Returns an error message that names an unknown setting and settings with similar names."""
    if name in RETIRED:
        return f"--config.{name} no longer exists: leave it out, which means {RETIRED[name]!r}"
    section = f"{name.rstrip('.')}."
    if inner := [k.removeprefix(section) for k in SETTINGS if k.startswith(section)]:
        return (
            f"--config.{name} is a section of settings: write --config.{section}NAME=VALUE, where "
            f"NAME is one of {', '.join(inner)}"
        )
    near = difflib.get_close_matches(name, SETTINGS, n=3, cutoff=0.5)
    same_end = [k for k in SETTINGS if k.split(".")[-1] == name.split(".")[-1]]
    same_end.sort(key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())
    likely = list(dict.fromkeys([*same_end, *near]))
    hint = f"did you mean {' or '.join(likely)}?" if likely else "--help all lists all settings"
    return f"--config.{name} is not a setting: {hint}"


def drop_retired_settings(saved: Mapping[str, object], source: str) -> dict[str, object]:
    """Returns the saved settings without the settings that no longer exist.

    Args:
      saved: the settings of an older run, by name.
      source: the origin of the settings, such as a file, for the error message.

    Raises:
      ValueError: a retired setting has another value than in `RETIRED`.
    """
    for name, no_op in RETIRED.items():
        if saved.get(name, no_op) != no_op:
            raise ValueError(
                f"{source} has {name}={saved[name]!r}: this setting no longer exists, and only a "
                f"run with {name}={no_op!r} can be continued"
            )
    return {name: value for name, value in saved.items() if name not in RETIRED}


# ------------------------------------------------------------------------------ in words


class Description(NamedTuple):
    """A setting, described in words.

    Attributes:
      allowed: the choices or the range; "" if every value of the type is allowed.
      read_when: the conditions under which the setting is read; "" if the setting is always read.
    """

    name: str
    default: object
    comment: str
    allowed: str
    read_when: str


def describe(tables: Tables = None) -> Iterator[Description]:
    """Yields the description of every setting, in the order of `SETTINGS`.

    Args:
      tables: the result of `training.table_rules.collect_choice_tables()`. If `tables` is None, a
        description names the file of a table instead of the table's entries.
    """
    for name, setting in SETTINGS.items():
        allowed = setting.allowed
        if isinstance(allowed, Choices):
            words = ", ".join(choices(name, tables)) or f"an entry of {allowed.table}"
        else:
            words = allowed.words if allowed else ""
        conditions = "; and ".join(spell(name, when, tables) for when in setting.read_when)
        yield Description(name, setting.default, setting.comment, words, conditions)


def choices(name: str, tables: Tables) -> tuple[str, ...]:
    """Returns the choices of a setting; () if the setting has none, or if `tables` is missing."""
    allowed = SETTINGS[name].allowed
    if not isinstance(allowed, Choices) or (allowed.table and tables is None):
        return ()
    found = tuple(tables[name]) if allowed.table and tables else allowed.names
    return (*found, "module:function") if allowed.function else found


def list_choices(names: Iterable[str]) -> str:
    """Returns "it must be X" for one choice, and "the choices are X, Y" for several."""
    every = list(names)
    return f"it must be {every[0]}" if len(every) == 1 else f"the choices are {', '.join(every)}"


def spell(name: str, when: Condition | ListedBy, tables: Tables) -> str:
    """Returns a condition in words; for a `ListedBy`, names the entries that list the setting."""
    if isinstance(when, Condition):
        return when.words
    entries = tables[when.setting] if tables else {}
    listing = [entry for entry, settings in entries.items() if name in settings]
    return f"{when.setting}={' or '.join(listing)}" if listing else f"some of {when.setting}"
