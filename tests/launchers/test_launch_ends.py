"""How runs end under the launchers for clusters: signals, exit codes, and starts without progress.

The hosts are folders of this machine, on which the launchers' commands run for real: the lock, the
signals, the count of starts. Only the program is a stand-in. It ends as the file `plan` says.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import conftest
import launchers
import pytest
import yaml

# Each start takes the next entry of the plan: an exit code, and whether a checkpoint is saved. The
# code "wait" waits for a signal. Each start tells its process id.
PROGRAM = """
import json, os, signal, sys, time
here = os.environ["HERE"]
plan = json.load(open(here + "/plan"))
code, saves = plan.pop(0) if len(plan) > 1 else plan[0]
json.dump(plan, open(here + "/plan", "w"))
workdir = [a for a in sys.argv if a.startswith("--workdir=")][0].split("=", 1)[1]

def tell(*values):
    with open(here + "/told", "a") as file:
        file.write(json.dumps(values) + chr(10))

def save():
    if saves:
        os.makedirs(f"{workdir}/checkpoints/{time.time_ns()}")

def stop(number, _):
    tell(signal.Signals(number).name)
    if not os.path.exists(here + "/deaf"):
        time.sleep(0.3)
        save()
        sys.exit(128 + number)

hang_up = signal.getsignal(signal.SIGHUP)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
print("a line of the run", flush=True)
tell("start", os.getpid(), hang_up == signal.SIG_IGN)
while code == "wait":
    time.sleep(0.01)
save()
sys.exit(code)
"""

GCLOUD = """#!/bin/bash
for command; do :; done
case "$*" in
  *" list "*) cat "$HERE/state"; exit ;;
  *" ssh "*) ;;
  *) exit 0 ;;
esac
[[ $command != *"uv venv"* ]] || exit 0
cd "$HERE" && HOME=$HERE exec bash -c "${command#--command=}"
"""


def _hear_signals():
    """Undoes nohup: bash cannot trap a signal that it inherits as ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Place:
    """A folder that stands for the hosts, with tools of the clouds on its PATH."""

    def __init__(self, folder):
        self.folder = folder
        package = folder / "copsd_jax" / "copsd_jax"
        (folder / "copsd_jax" / ".venv" / "bin").mkdir(parents=True)
        (folder / "copsd_jax" / ".venv" / "bin" / "python").symlink_to(sys.executable)
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "runtime").symlink_to(conftest.ROOT / "copsd_jax" / "runtime")
        (package / "main.py").write_text(PROGRAM)
        (folder / "bin").mkdir()
        self.tool("gcloud", GCLOUD)
        self.state("ACTIVE")
        self.arguments = ["--config=configs/opsd.py:tiny", f"--workdir={folder}/shared/W"]
        self.settings = {"SHARED": "1.1.1.1:/s", "MOUNT": f"{folder}/shared", "PROJECT": "p",
                         "ZONE": "z", "LOOK": "0.01", "LOOKS": "3"}  # fmt: skip

    def tool(self, name, text):
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def state(self, state):
        (self.folder / "state").write_text(state)

    def plan(self, *entries):
        (self.folder / "plan").write_text(json.dumps(entries))

    def told(self):
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self):
        return sum(line[0] == "start" for line in self.told())

    def start(self, *command, **settings):
        environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), "USER": "me",
            "HERE": str(self.folder),
        }  # fmt: skip
        return subprocess.Popen(
            [str(word) for word in command], env=environment | self.settings | settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=conftest.ROOT,
            start_new_session=True, preexec_fn=_hear_signals,
        )  # fmt: skip

    def pod(self, **settings):
        return self.start(launchers.LAUNCH / "tpu_pod.sh", *self.arguments, **settings)

    def wait_for(self, *line):
        until = time.monotonic() + 60
        while not any(told[: len(line)] == list(line) for told in self.told()):
            assert time.monotonic() < until
            time.sleep(0.02)

    def processes(self):
        """The commands of this machine that have this folder in their environment."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if f"HERE={self.folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append((path / "cmdline").read_bytes())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return [command for command in found if command]  # one that has ended has none


@pytest.fixture
def place(tmp_path):
    if not (shutil.which("flock") and shutil.which("fuser")):
        pytest.skip("needs flock and fuser, as the hosts of a pod do")
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place")


def ended(started):
    try:
        out, err = started.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    return started.returncode, out, err


# ---- Cloud TPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 143])
def test_pod_has_the_programs_exit_code_and_starts_it_once(place, code):
    place.plan([code, False])
    got, out, err = ended(place.pod())
    assert got == code, err
    assert place.starts() == 1
    assert "a line of the run\n" in out
    assert (f"error: the run ended with {code}: " in err) == (code != 0)
    assert not place.processes()


def test_pod_ends_a_run_without_progress(place):
    """A run that its machines kill each time, before it has saved anything."""
    place.plan([255, True], [255, False])
    code, _, err = ended(place.pod())
    assert code == 255
    assert place.starts() == 4  # the first one saved a checkpoint, three did not
    sentences = err.splitlines()
    assert len(sentences) == 2
    assert f"--workdir={place.folder}/shared/W: 3 starts in a row made no progress" in sentences[0]
    assert sentences[1].startswith("error: the run ended with 255: see the lines above")
    # The user's next command tries again.
    place.plan([0, False])
    assert ended(place.pod())[0] == 0


def test_pod_goes_on_while_there_is_progress(place):
    place.plan(*[[255, True]] * 7, [0, True])
    assert ended(place.pod(MAX_TRIES_WITHOUT_PROGRESS="1"))[0] == 0
    assert place.starts() == 8


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
@pytest.mark.parametrize("group", [False, True], ids=["script", "group"])
def test_a_signal_to_the_script_stops_the_run_on_the_hosts(place, number, code, group):
    """Ctrl-C in a terminal goes to the whole group: the run must still be asked only once."""
    place.plan(["wait", True])
    pod = place.pod()
    place.wait_for("start")
    os.killpg(pod.pid, number) if group else pod.send_signal(number)
    got, _, err = ended(pod)
    assert got == code
    assert [line[0] for line in place.told()] == ["start", "SIGTERM"]
    assert place.told()[0][2]  # a lost connection or a shutdown sends HUP, which must not end it
    assert len(list((place.folder / "shared" / "W" / "checkpoints").iterdir())) == 1
    assert err.startswith("all hosts save the run and stop; a second signal ends")
    assert f"error: the run ended with {code}: repeat the command to continue." in err
    assert not place.processes()


def test_a_second_signal_ends_the_script_alone(place):
    place.plan(["wait", True])
    (place.folder / "deaf").touch()
    pod = place.pod()
    place.wait_for("start")
    pid = place.told()[0][1]
    try:
        pod.send_signal(signal.SIGINT)
        place.wait_for("SIGTERM")
        assert pod.poll() is None
        pod.send_signal(signal.SIGINT)
        assert pod.wait(60) == 130
    finally:
        os.kill(pid, signal.SIGKILL)  # the run on the host, and with it what waits for its lock
        pod.communicate(timeout=60)


def test_a_signal_ends_the_wait_for_machines(place):
    place.state("WAITING_FOR_RESOURCES")
    pod = place.pod(LOOK="300")
    assert pod.stdout.readline() == "copsd: WAITING_FOR_RESOURCES\n"
    time.sleep(0.2)
    begun = time.monotonic()
    pod.send_signal(signal.SIGTERM)
    assert ended(pod)[0] == 143
    assert time.monotonic() - begun < 30
    assert not place.processes()


def test_a_newer_start_takes_the_place_of_an_older_one(place):
    place.plan(["wait", True], [0, True])
    older = place.pod()
    place.wait_for("start")
    assert ended(place.pod())[0] == 0
    code, _, err = ended(older)
    assert code == 143, err
    assert [line[0] for line in place.told()] == ["start", "SIGTERM", "start"]


# ---- SLURM ---------------------------------------------------------------------------------------


class Cluster(Place):
    """Jobs of SLURM, whose tools write down their calls; srun runs the program here."""

    def __init__(self, folder):
        super().__init__(folder)
        self.settings = {"SHARED": str(folder), "PYTHON": sys.executable, "NODES": "1"}
        self.tool("srun", f'#!/bin/bash\ncd {folder}/copsd_jax\nexec "${{@:5}}"\n')
        for name in ("scontrol", "scancel"):
            self.tool(name, f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n')
        # scancel sends its signal to the processes of the step, here the newest one.
        with (folder / "bin" / "scancel").open("a") as file:
            file.write(
                f"kill -TERM $(sed -n 's/.*start\", \\([0-9]*\\).*/\\1/p' {folder}/told|tail -n1)"
            )

    def script(self):
        done = self.start(launchers.LAUNCH / "slurm.sh", "--print", *self.arguments)
        text = ended(done)[1]
        return text.split("sbatch << 'JOB'\n")[1].split("\nJOB\n")[0] + "\n"

    def job(self, start=0, **settings):
        path = self.folder / "job"
        path.write_text(self.script())
        counted = {"SLURM_RESTART_COUNT": str(start)} if start else {}
        return self.start("bash", path, SLURM_JOB_ID="17", **counted, **settings)

    def calls(self):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "place").mkdir()
    return Cluster(tmp_path / "place")


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 7, 130, 143])
def test_a_job_has_the_programs_exit_code_and_is_not_queued_again(cluster, code):
    cluster.plan([code, False])
    got, out, err = ended(cluster.job())
    assert (got, out, err) == (code, "a line of the run\n", "")
    assert cluster.calls() == []


def test_a_job_has_the_exit_code_of_a_program_that_ends_at_once(cluster):
    """Bash has forgotten the process before the job looks whether it still runs."""
    cluster.tool("srun", "#!/bin/bash\nexit 7\n")
    script = cluster.script().replace("program &\n", "program &\nsleep 0.3\n")
    (cluster.folder / "late").write_text(script)
    assert ended(cluster.start("bash", cluster.folder / "late"))[0] == 7


TERM, REQUEUE = "scancel --signal=TERM 17", "scontrol requeue 17"


def test_a_job_whose_time_is_nearly_up_queues_itself(cluster):
    cluster.plan(["wait", True])
    job = cluster.job()
    cluster.wait_for("start")
    job.send_signal(signal.SIGUSR1)
    assert ended(job)[0] == 143  # the exit code of the program, for which the job waits
    assert [line[0] for line in cluster.told()] == ["start", "SIGTERM"]
    assert cluster.calls() == [TERM, REQUEUE]


@pytest.mark.parametrize(
    "code, queued", [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (134, 1), (137, 1)]
)
def test_a_program_that_has_ended_is_not_queued_again(cluster, code, queued):
    """It ends by itself just as the time limit nears."""
    cluster.plan([code, True])
    cluster.tool("srun", f"#!/bin/bash\necho > {cluster.folder}/runs\nsleep 0.5\nexit {code}\n")
    cluster.tool("scancel", "#!/bin/bash\n")
    job = cluster.job()
    while not (cluster.folder / "runs").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert ended(job)[0] == code
    assert cluster.calls() == [REQUEUE] * queued


def test_a_job_that_is_cancelled_has_the_programs_exit_code(cluster):
    """SLURM sends TERM to the steps, and in some settings to the script too."""
    cluster.plan(["wait", True])
    job = cluster.job()
    cluster.wait_for("start")
    os.kill(cluster.told()[0][1], signal.SIGTERM)
    job.send_signal(signal.SIGTERM)
    assert ended(job)[0] == 143
    assert [line[0] for line in cluster.told()] == ["start", "SIGTERM"]
    assert cluster.calls() == []


@pytest.mark.parametrize("saves", [False, True])
def test_a_job_without_progress_is_not_queued_again(cluster, saves):
    cluster.plan(["wait", saves])
    for start in range(5):
        job = cluster.job(start)
        while cluster.starts() <= start:
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        code, _, err = ended(job)
        assert code == 143
        if not saves and start == 2:
            assert "3 starts in a row made no progress" in err
            assert err.count("\n") == 1
            assert cluster.calls() == [TERM]
            return
        assert err == ""
        assert cluster.calls() == [TERM, REQUEUE]
    assert saves


def test_a_job_that_slurm_queues_again_is_refused_without_progress(cluster):
    """After a preemption or the loss of a node, the script does not come to its end."""
    cluster.plan(["wait", False])
    for start in range(3):
        job = cluster.job(start)
        while cluster.starts() <= start:
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)
        ended(job)
    code, out, err = ended(cluster.job(3))
    assert (code, out) == (2, "")
    assert "3 starts in a row made no progress" in err
    assert cluster.starts() == 3


# ---- GKE -----------------------------------------------------------------------------------------


def run_jobset(place, jobset):
    """Runs the first Pod of a JobSet as the rules of Kubernetes and JobSet say.

    Returns the JobSet's last state and the exit code of the last Pod.
    """
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"], job["backoffLimit"]) == (
        "RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"], 0
    )  # fmt: skip
    ends = [r["onExitCodes"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r]
    counted = 0
    for attempt in range(20):
        arguments = [word.replace("$(ATTEMPT)", str(attempt)) for word in container["args"]]
        command = f'cd {place.folder}/copsd_jax && exec {sys.executable} "$@"'
        code, _, err = ended(place.start("bash", "-c", command, "pod", *arguments))
        if code == 0:
            return "Completed", code, err
        if not any(code in end["values"] for end in ends):
            if counted == jobset["spec"]["failurePolicy"]["maxRestarts"]:
                return "Failed", code, err
            counted += 1
    return "Running", code, err


def jobset_of(place):
    settings = {"IMAGE": "image", "SHARED": "pvc:claim"}
    printed = place.start(launchers.LAUNCH / "gke.sh", "--print", *place.arguments, **settings)
    text = ended(printed)[1]
    return yaml.safe_load(text.split("<< 'MANIFEST'\n")[1].split("\nMANIFEST\n")[0])


@pytest.mark.parametrize(
    "plan, state, code, starts",
    [
        ([[0, True]], "Completed", 0, 1),
        ([[1, True]], "Failed", 1, 1),
        ([[2, True]], "Failed", 2, 1),
        ([[3, True]], "Failed", 3, 1),
        ([[126, True]], "Failed", 126, 1),
        ([[143, False]], "Failed", 2, 3),
        ([[137, True], [134, False]], "Failed", 2, 4),
        ([*[[143, True]] * 9, [0, True]], "Completed", 0, 10),
    ],
)
def test_what_a_jobset_starts_again(place, plan, state, code, starts):
    place.plan(*plan)
    last, got, err = run_jobset(place, jobset_of(place))
    assert (last, got, place.starts()) == (state, code, starts)
    assert ("3 starts in a row made no progress" in err) == (starts in (3, 4))


def test_a_signal_to_a_pod_reaches_the_program(place):
    place.plan(["wait", True])
    container = jobset_of(place)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    arguments = container["spec"]["containers"][0]["args"]
    command = f'cd {place.folder}/copsd_jax && exec {sys.executable} "$@"'
    words = [word.replace("$(ATTEMPT)", "0") for word in arguments]
    pod = place.start("bash", "-c", command, "pod", *words)
    place.wait_for("start", pod.pid)  # the program is the Pod's own process
    pod.send_signal(signal.SIGTERM)
    assert ended(pod)[:2] == (143, "a line of the run\n")
