"""Writes a new experiment card, whose settings are those of a bundled card.

    copsd-jax new-card NAME [--from=CARD[:PRESET]]

The file NAME.py in the current directory has a comment for each setting. It contains all settings
in which the other card differs from the defaults, and the settings that users change most often.
The preset `tiny` of the new card takes a few steps with a random model.
"""

import argparse
import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from copsd_jax.runtime import startup

if __name__ == "__main__":
    startup.begin()  # first, because the imports below take time

from copsd_jax.config import cards
from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import failures, storage

# Settings that every new card contains, even with their defaults.
ALWAYS = (
    "method", "seed", "description", "model.path", "data.path", "data.lang", "data.fields",
    "rollout.max_tokens", "train.steps", "train.batch", "train.lr", "train.warmup",
    "train.save_every", "eval.path", "eval.limit", "eval.every",
)  # fmt: skip

_CARD = '''\
"""{name}: an experiment card, which began as a copy of the settings of {source}.

    copsd-jax --config={name}.py
    copsd-jax --config={name}.py:tiny       # a few steps with a random model
    copsd-jax --help train                  # all settings of a section

State here what you want to find out, the device, the hours, and the result.
"""

from copsd_jax import config as config_lib


def _run() -> config_lib.Config:
    """Returns the settings of the run; all others have their defaults."""
    c = config_lib.default()
{run}
    return c


def _tiny() -> config_lib.Config:
    """Returns the settings of the run, but for a random model of two layers."""
    c = _run()
{tiny}
    return c


# A preset is a variant of the run. To add one, write a function as above, and name it here.
PRESETS = {{"run": _run, "tiny": _tiny}}


def get_config(preset: str = "") -> config_lib.Config:
    """Returns the settings of a preset, or of `run` if `preset` is empty."""
    return config_lib.preset(PRESETS, preset, "run")()
'''


def parse_card_flags(argv: list[str]) -> argparse.Namespace:
    """Parses the program's flags; argv[0] is the program's name."""
    parser = startup.CommandParser(
        prog=startup.spell_program(argv, "new_card"),
        description="Writes NAME.py, an experiment card with comments, to the current directory.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the new card")
    parser.add_argument(
        "--from", default="opsd", dest="source", metavar="CARD[:PRESET]",
        help=f"card whose settings are copied: {', '.join(cards.bundled_cards())}; default: opsd",
    )  # fmt: skip
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    """Runs the program; returns 0 if the card was written, or 2 after an error message."""
    args = parse_card_flags(argv)
    name = args.name.removesuffix(".py")
    path = pathlib.Path(f"{name}.py")
    try:
        if not re.fullmatch(r"[A-Za-z][\w-]{0,99}", name):
            rule = "a name has letters, digits, _ and -, and begins with a letter"
            raise ValueError(f"NAME is {args.name!r}: {rule}")
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another name, or delete this file")
        text = write_card(name, args.source)
        with storage.explain(path), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except (ValueError, OSError) as error:
        return failures.report(error)
    print(f"{path} is written; to try it: copsd-jax --config={path}:tiny")
    return 0


def write_card(name: str, source: str) -> str:
    """Returns the text of a new card.

    Args:
      name: the name of the new card.
      source: a bundled card, perhaps followed by a colon and a preset.

    Raises:
      ValueError: there is no such card or preset.
    """
    card, colon, preset = source.partition(":")
    known = cards.bundled_cards()
    if card not in known:
        raise ValueError(f"--from={source}: the choices are {', '.join(known)}")
    file = str(known[card])
    presets = cards.describe_card(file).presets
    if colon and preset not in presets:
        raise ValueError(f"--from={source}: the presets of {card} are {', '.join(presets)}")
    run = config_lib.flat(cards.load_card(f"{file}{colon}{preset}"))
    tiny = config_lib.flat(cards.load_card(f"{file}:tiny"))
    default = config_lib.flat(config_lib.default())
    begun = [key for key in config_lib.SETTINGS if run[key] != default[key] or key in ALWAYS]
    other = [key for key in config_lib.SETTINGS if tiny[key] != run[key]]
    return _CARD.format(
        name=name, source=source, run=_write_lines(begun, run), tiny=_write_lines(other, tiny)
    )


def _write_lines(names: Iterable[str], values: Mapping[str, Any]) -> str:
    """Writes an assignment for each setting, below a comment, with a blank line per section."""
    lines, section = [], ""
    for name in names:
        if section and section != name.rpartition(".")[0]:
            lines.append("")
        section = name.rpartition(".")[0]
        lines += textwrap.wrap(
            config_lib.SETTINGS[name].comment, 100, initial_indent="    # ",
            subsequent_indent="    # ", break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
        lines.append(f"    c.{name} = {_write_value(values[name])}")
    return "\n".join(lines)


def _write_value(value: Any) -> str:
    """Writes a value in Python, with double quotes."""
    if isinstance(value, tuple):
        items = ", ".join(map(_write_value, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
