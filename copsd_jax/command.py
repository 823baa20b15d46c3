"""The console command of the package, which runs the program that its first word names.

    copsd-jax --config=CARD[:PRESET] [...]                as python -m copsd_jax.main
    copsd-jax evaluate|export|replay|new-card [...]       as python -m copsd_jax.evaluate, ...

The programs are the same as with `python -m`.
"""

import importlib
import os
import sys

from copsd_jax.runtime import startup

COMMANDS = {
    "evaluate": "copsd_jax.evaluate",
    "export": "copsd_jax.export",
    "replay": "copsd_jax.replay",
    "new-card": "copsd_jax.new_card",
}


def main() -> int:
    """Runs the command line of this process, and returns its exit code."""
    startup.begin()  # first, because the imports of a program take time
    # As with `python -m`, modules of the current directory can be imported, for example those that
    # reward.kind=module:function names.
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in COMMANDS:
        program = importlib.import_module(COMMANDS[word])
        return program.main([f"copsd-jax {word}", *sys.argv[2:]])
    if word and not word.startswith("-"):
        names = ", ".join(COMMANDS)
        print(
            f"error: {word!r} is no command: the commands are {names}; to train, write "
            "copsd-jax --config=CARD (copsd-jax --help shows the cards)",
            file=sys.stderr,
        )
        return 2
    from copsd_jax import main as train_command

    return train_command.main(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
