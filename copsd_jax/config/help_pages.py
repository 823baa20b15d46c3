"""The pages of `--help`: an overview, a section of settings, and a card with its values."""

import itertools
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from copsd_jax.config import cards
from copsd_jax.config import settings as config_lib
from copsd_jax.config.declaration import Choices, ListedBy, Range

RUN = "run"  # the section of the settings whose names have no section

SECTIONS = {
    RUN: "method, seed, description, and the file of languages",
    "model": "the base model: source, dtype, attention, random weights",
    "data": "training problems: files, fields, languages, limits",
    "prompt": "the student's prompt: template, thinking, worked examples, length",
    "context": "what the teacher sees besides the problem",
    "author": "who writes the context's text: student, teacher, rule, server or file",
    "tokens": "which tokens carry loss",
    "reward": "how a completion is graded",
    "teacher": "weights and prompt of the teacher",
    "rollout": "how completions are sampled during training",
    "loss": "the divergence between teacher and student",
    "policy": "the policy gradient: GRPO, and mixtures with a divergence",
    "guards": "rules that warn, lower the learning rate or stop the run",
    "check": "the self-test before the first step",
    "sampler": "the engine that samples: in this process, or a server",
    "train": "steps, batch, optimizer, checkpoints",
    "lora": "the adapter: rank, scale, projections",
    "eval": "evaluation: problems, sampling, grading",
    "parity": "departures that reproduce published code",
    "mesh": "devices and processes",
    "log": "a function of your own that sees the metrics of each step",
    "compile": "the folder that keeps compiled programs",
}

_USAGE = """\
Trains according to an experiment card, and evaluates before and after training.

usage:
  copsd-jax --config=CARD[:PRESET] [--workdir=W] [--config.A.B=X ...]
  copsd-jax evaluate | export | replay | new-card [--help] [...]

`python -m copsd_jax.main` is the same as `copsd-jax`. To continue a stopped run, repeat the
command. Ctrl-C saves and ends a run.

flags:
  --config=CARD[:PRESET]  a file such as configs/opsd.py, or the name of a card below
  --workdir=W             directory of the run; default: runs/<config>[-<preset>]
  --config.A.B=X          another value of a setting, for example --config.train.steps=20
  --init_from=W2          start from other weights: a work directory, a PEFT adapter or a
                          Hugging Face model
  --dry_run=DEVICES       compile for devices that are not present, such as v5e-32, v5e:4x8,
                          2*v5e:16x16 or cuda:h200:1x8; report memory and time of a step
  --dry_run_json=FILE     file for the report of the dry run
  --search                with --dry_run: find the largest micro-batch and the most slots
"""

_MORE = """\
more help:
  --help SECTION          the settings of a section, with defaults, meaning and choices
  --help A.B              one setting, for example --help train.lr
  --help all              every setting
  --config=CARD[:PRESET] --help
                          the card's presets, and the values that differ from the defaults

exit codes:
  0 ended; 1 error during the run, or the dry run does not fit; 2 wrong setting, or refused;
  3 stopped at a value that is not finite; 4 ended, but skipped steps; 130, 143 stopped by a signal
"""


class Request(NamedTuple):
    """A request for help.

    Attributes:
      topic: a section, a setting or "all"; "" if none is named.
      card: the value of --config; "" if there is none.
    """

    topic: str
    card: str


def find_request(argv: Sequence[str]) -> Request | None:
    """Returns the request for help in a command line, or None; all other arguments are ignored."""
    topic, card = None, ""
    for word, after in itertools.pairwise([*argv[1:], "-"]):
        flag, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or flag not in ("h", "help", "config"):
            continue
        if not equals:
            value = "" if after.startswith("-") else after
        if flag == "config":
            card = value
        else:
            topic = topic or value
    return None if topic is None else Request(topic, card)


def needs_tables(names: Iterable[str]) -> bool:
    """Tells whether the descriptions of settings need the tables of choices."""
    declared = [config_lib.SETTINGS[name] for name in names]
    return any(
        (isinstance(setting.allowed, Choices) and setting.allowed.table)
        or any(isinstance(when, ListedBy) for when in setting.read_when)
        for setting in declared
    )


def select_settings(topic: str) -> list[str]:
    """Returns the names of the settings that a topic names.

    Args:
      topic: a section, the full name of a setting, or "all".

    Raises:
      ValueError: the topic is unknown; the message lists the sections.
    """
    name = topic.removeprefix("--").removeprefix("config.").rstrip(".")
    if name == "all":
        return list(config_lib.SETTINGS)
    if name in config_lib.SETTINGS:
        return [name]
    if name in SECTIONS:
        return [full for full in config_lib.SETTINGS if _section_of(full) == name]
    sections = ", ".join(SECTIONS)
    raise ValueError(
        f"--help {topic}: there is no such section; the choices are {sections}, all, and the name "
        "of a setting, such as train.lr"
    )


def _section_of(name: str) -> str:
    return name.rpartition(".")[0] or RUN


def format_overview() -> str:
    """Returns the page of `--help` without a topic: usage, flags and sections of settings."""
    sections = [f"  {name:<22}  {text}" for name, text in SECTIONS.items()]
    lines = [_USAGE, "cards, with their presets:"]
    for name in cards.bundled_cards():
        lines += _wrap(f"{name}: {', '.join(cards.describe_card(name).presets)}", 2, 10)
    return "\n".join([*lines, "", "sections of settings:", *sections, "", _MORE])


def format_settings(names: Sequence[str], tables: config_lib.Tables, card: str = "") -> str:
    """Returns the page of some settings: default, meaning, choices or range, and conditions.

    Args:
      names: the names of the settings.
      tables: as for `settings.describe`; needed if `needs_tables` is true.
      card: the value of --config, whose values are shown beside the defaults; "" for none.
    """
    values = config_lib.flat(cards.load_card(card)) if card else {}
    lines, section = [], ""
    for setting in config_lib.describe(tables):
        if setting.name not in names:
            continue
        if section != (section := _section_of(setting.name)):
            lines += [f"{section}: {SECTIONS[section]}", ""]
        lines.append("  " + _spell_flag(setting.name, setting.default))
        if card and values[setting.name] != setting.default:
            lines.append(f"      in {card}: {spell_value(values[setting.name])}")
        lines += _wrap(setting.comment)
        lines += _wrap(_spell_allowed(setting.name, setting.allowed, tables))
        lines += _wrap(setting.read_when and f"read with {setting.read_when}")
        lines.append("")
    return "\n".join(lines)


def format_card(argument: str) -> str:
    """Returns the page of a card: its presets, and the values that differ from the defaults."""
    card, name = cards.describe_card(argument), argument.partition(":")[0]
    lines = [*_wrap(card.summary or f"the card {name}", 0), ""]
    if card.presets:
        width = max(map(len, card.presets))
        lines.append(f"presets (--config={name}:PRESET):")
        lines += [f"  {preset:<{width}}  {text}".rstrip() for preset, text in card.presets.items()]
        lines.append("")
    values, differing = config_lib.flat(card.config), []
    for setting, declared in config_lib.SETTINGS.items():
        if values[setting] != declared.default:
            flag = _spell_flag(setting, values[setting])
            differing.append(f"  {flag:<50}  (default {spell_value(declared.default)})")
    found = "differs from the defaults in:" if differing else "has the defaults"
    return "\n".join([*lines, f"--config={argument} {found}", *differing])


def spell_value(value: Any) -> str:
    """Returns a value as a user writes it after "=" in a shell."""
    words = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
    if words and not any(set(item) & set(", '\"\\\n") or not item for item in value):
        return shlex.quote(",".join(value))
    return shlex.quote(value if isinstance(value, str) else repr(value))


def _spell_flag(name: str, value: Any) -> str:
    return f"--config.{name}={spell_value(value)}"


def _spell_allowed(name: str, words: str, tables: config_lib.Tables) -> str:
    allowed, default = config_lib.SETTINGS[name].allowed, config_lib.SETTINGS[name].default
    if isinstance(allowed, Choices):
        found = [choice or "''" for choice in config_lib.choices(name, tables)]
        return f"choices: {', '.join(found) or words}"
    if isinstance(allowed, Range):
        return f"allowed: {words}"
    return "choices: True, False" if isinstance(default, bool) else ""


def _wrap(text: str, first: int = 6, later: int | None = None) -> list[str]:
    """Returns a text as lines that fit the terminal, with the given indents."""
    width = max(40, min(100, shutil.get_terminal_size().columns))
    margins = " " * first, " " * (first if later is None else later)
    return textwrap.wrap(
        text, width, initial_indent=margins[0], subsequent_indent=margins[1], break_on_hyphens=False
    )
