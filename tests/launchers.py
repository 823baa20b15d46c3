"""A shell for tests of launchers. What they would run is found by running it: the text of --print,
and SLURM's batch script, go through a shell whose gcloud, kubectl, sbatch and so on only write down
their arguments. No test can reach a cloud: PATH has these and a few plain tools, nothing else."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import conftest

LAUNCH = conftest.ROOT / "launch"
PLAIN = ("bash", "sh", "env", "dirname", "sed", "cat", "sleep")  # what the launchers use anywhere
PROGRAM = ["--config=configs/opsd.py:tiny", '--config.rollout.stop=it\'s "a" $(b) \\n & ${NAME}']
MAIN = ["-m", "copsd_jax.main"]
AUTO = "--config.mesh.coordinator=auto"

# A tool that writes down how it was called, and answers as told: for the first word of `answers`
# among its arguments, with the next of that word's [output, exit code]; the last one stays.
STUB = """#!{python} -SE
import json, os, sys
here = os.path.dirname(sys.argv[0])
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
reads = call[0] == "sbatch" or "apply" in call
with open(here + "/calls", "a") as calls:
    calls.write(json.dumps([call, sys.stdin.read() if reads else ""]) + chr(10))
answers = json.load(open(here + "/answers"))
for word in answers:
    if any(word in argument for argument in call):
        output, code = answers[word][0]
        if len(answers[word]) > 1:
            answers[word].pop(0)
            json.dump(answers, open(here + "/answers", "w"))
        print(output, end="")
        sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Shell:
    """A PATH of plain tools and stubs, and what the stubs were called with."""

    folder: pathlib.Path

    def run(self, *command, stdin=None, cwd=conftest.ROOT, **settings):
        environment = {"PATH": str(self.folder), "HOME": str(self.folder), "USER": "me"}
        return subprocess.run(
            [str(word) for word in command],
            env=environment | settings, cwd=cwd, input=stdin, text=True, capture_output=True,
            timeout=60,
        )  # fmt: skip

    def calls(self):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return [json.loads(line)[0] for line in lines]

    def inputs(self):
        return [json.loads(x)[1] for x in (self.folder / "calls").read_text().splitlines()]

    def answer(self, **answers):
        (self.folder / "answers").write_text(json.dumps(answers))


def shell_with(folder, *tools):
    for tool in PLAIN:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for tool in tools:
        (folder / tool).write_text(STUB.format(python=sys.executable))
        (folder / tool).chmod(0o755)
    shell = Shell(folder)
    shell.answer()
    return shell


TOOLS = ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "srun", "scontrol", "tar", "mkdir")


def bare(folder):
    """Without any tool of a cloud, as on a laptop."""
    (folder / "bare").mkdir()
    return shell_with(folder / "bare")


def recording(folder):
    """With stubs of all tools."""
    (folder / "bin").mkdir()
    return shell_with(folder / "bin", *TOOLS)


def printed(bare, script, *arguments, **settings):
    """The text of --print, which needs no tool."""
    done = bare.run(LAUNCH / script, "--print", *arguments, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def executed(shell, text, **kwargs):
    """The calls that a shell makes of a text."""
    done = shell.run("bash", "-e", stdin=text, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    return shell.calls()
