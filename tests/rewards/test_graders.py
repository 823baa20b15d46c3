"""Oracles: tables of answers, hostile strings, /proc."""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import mostly_slow

from copsd_jax.rewards import extraction, graders, worker_process


@pytest.fixture(scope="module")
def grader():
    with graders.Grader("boxed", "last_after_think", seconds=10.0) as it:
        yield it


@pytest.fixture(scope="module")
def hasty():
    """Short of time and memory, for hostile strings."""
    with graders.Grader("boxed", "last_anywhere", 1.0, workers=1, memory=1 << 30) as it:
        yield it


def test_plain_answers_start_no_worker():
    with graders.Grader("boxed", "last_after_think", 5.0) as grader:
        start = time.monotonic()
        grades = grader.grade_all([(str(i % 50), rf"\boxed{{{i}}}") for i in range(1000)])
        assert sum(grade.correct for grade in grades) == 50
        assert time.monotonic() - start < 5
        assert all(worker._process is None for worker in grader._workers)


@pytest.mark.parametrize(
    "gold, answer, verdict",
    [
        ("x^2-1", "(x-1)(x+1)", (True, "symbolic")),
        (r"2\sqrt{2}", r"\sqrt{8}", (True, "symbolic")),
        (r"\{1,2\}", r"\{2, 1\}", (True, "symbolic")),
        (r"\frac{\pi}{2}", r"0.5\pi", (True, "symbolic")),
        ("x=5", "5", (True, "plain")),
        ("0.5", r"50\%", (True, "plain")),
        ("18", "18 million", (False, "plain")),
        ("x^2", "x^3", (False, "symbolic")),
        ("(1,2)", "(2,1)", (False, "symbolic")),
        ("5", r"\frac{", (False, "unparsed")),
    ],
)
def test_math_verify_decides(grader, gold, answer, verdict):
    assert grader.compare(gold, answer) == verdict


def test_grades_keep_their_order(grader):
    grades = grader.grade_all(
        [("4", r"\boxed{2^2}"), ("4", "4"), ("4", r"\boxed{5}"), ("4", r"\boxed{2^2}")]
    )
    assert grades[0] == graders.Grade("2^2", True, "symbolic")
    assert grades[1] == graders.Grade(None, False, "no_answer")
    assert grades[2] == graders.Grade("5", False, "plain")
    assert grades[3] == grades[0]
    assert {grade.status for grade in grades} <= set(graders.STATUSES)
    assert grader.grade_all([("4", r"\boxed{4}")])[0].correct
    with pytest.raises(ValueError, match="pair 1 is empty"):
        grader.grade_all([("1", ""), (" ", "")])


def test_bug_28_classes_of_equal_answers(grader):
    """Bug 28: votes go to values, not to raw strings."""
    answers = ["0.5", None, "1/2", "7", r"\frac{2}{4}", "50\\%", "7.0", "8"]
    assert grader.same_class(answers) == [0, -1, 0, 1, 0, 0, 1, 2]


def test_an_answer_is_compared_once(monkeypatch):
    asked = []

    def ask(worker, gold, answer, seconds, strict=True):
        asked.append((gold, answer, seconds))
        return "equal"

    monkeypatch.setattr(worker_process.Worker, "ask", ask)
    grader = graders.Grader("boxed", "last_anywhere", 3.0)
    grades = grader.grade_all([("y^2", r"\boxed{y y}")] * 3 + [("y^2", r"\boxed{yyy}")])
    assert [grade.status for grade in grades] == ["symbolic"] * 4
    assert grader.compare("y^2", "$y y$") == (True, "symbolic")
    assert sorted(asked) == [("y^2", "y y", 3.0), ("y^2", "yyy", 3.0)]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with (
        graders.Grader("boxed", "last_anywhere", 3.0) as grader,
        pytest.raises(RuntimeError, match=r"did not start .died.*import math_verify"),
    ):
        grader.grade_all([("4", r"\boxed{2^2}")])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_holds_no_jax_and_a_memory_limit(hasty):
    hasty.compare("2", r"\sqrt{4}")
    pid = hasty._workers[0]._process.pid
    assert os.getpgid(pid) != os.getpgid(0)  # Ctrl-C does not reach it
    assert "jaxlib" not in pathlib.Path(f"/proc/{pid}/maps").read_text()
    limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(1 << 30)


HOSTILE = {
    "power tower": r"9^{9^{9^9}}",
    "factorial": "(10^9)!",
    "nested braces": "{" * 400 + "}" * 400,
    "nested fractions": r"\frac{1}{" * 60 + "x" + "}" * 60,
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^{n}}",
    "python": "__import__('os').system('touch owned')",
    "null bytes": "4\0\0 2\0x",
    "surrogate": "\ud800x",
    "newlines": "4\n\n2\r\n]\n",
    "dollars": "$$$$x$$",
    "quotes": '"]\n["5", "5", 1]',
}


@pytest.mark.parametrize("name", mostly_slow(HOSTILE, 8))
def test_hostile_answers_end_in_a_status(hasty, name):
    hasty.compare("4", f"2^2 + {name[0]}")  # a worker is running
    start = time.monotonic()
    same, status = hasty.compare("4 x", HOSTILE[name])
    assert not same
    assert status in graders.STATUSES
    assert time.monotonic() - start < 5
    assert not os.path.exists("owned")
    # The next question gets its own answer, not a late one.
    number = list(HOSTILE).index(name)
    assert hasty.compare(f"y+{number}", f"{number}+y") == (True, "symbolic")


def test_time_out_is_a_status_and_the_worker_is_replaced():
    with graders.Grader("boxed", "last_anywhere", 0.5, workers=1) as grader:
        assert grader.grade_all([("5", r"\boxed{9^{9^{9^9}}}")])[0].status == "timeout"
        assert grader._workers[0]._process is None
        assert grader.compare("4", "2^2") == (True, "symbolic")
        process: Any = grader._workers[0]._process
        process.kill()
        process.wait()
        assert grader.compare("9", "3^2") == (True, "symbolic")
    assert grader._workers[0]._process is None


def test_a_worker_that_dies_in_the_middle_is_a_status(monkeypatch):
    with graders.Grader("boxed", "last_anywhere", 5.0, workers=1) as grader:
        grader.compare("4", "2^2")
        worker = grader._workers[0]
        send = worker._send

        def kill_then_send(question):
            worker._process.kill()
            send(question)

        monkeypatch.setattr(worker, "_send", kill_then_send)
        assert grader.compare("9", "3^2") == (False, "died")
        assert "died" in graders.UNRESOLVED


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000 + "}" * 100_000,
        r"\boxed{" * 100_000,
        r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "1," * 500_000 + "}",
        r"\boxed{1 " + "a " * 500_000 + "1}",
        r"\boxed{" + "፼" * 500_000 + "}",
        "the" + " " * 1_000_000,
        "The answer is " * 70_000,
        "The answer is " + "1 " * 500_000,
        "The answer is " + "$" * 1_000_000,
        "<think>" * 140_000,
        "\\" * 1_000_000,
    ],
    ids=lambda text: f"{text[:12]}*{len(text)}",
)
def test_long_texts_take_linear_time(hasty, text):
    start = time.monotonic()
    for pattern in extraction.PATTERNS:
        answer = extraction.extract_answer(text, pattern, "last_anywhere")
        if answer:
            assert hasty.compare("5", answer) in [(False, "plain"), (False, "too_long")]
    assert time.monotonic() - start < 10


def test_five_power_towers_end_in_time(monkeypatch):
    """Each formula that exceeds the limit is asked a bounded number of times; 66 s without."""
    towers = [f"{base}^{{9^{{9^9}}}}" for base in (2, 3, 5, 6, 7)]
    asked = []

    def ask(worker, gold, answer, seconds, strict=True):
        asked.append((gold, answer))
        return "timeout"

    monkeypatch.setattr(worker_process.Worker, "ask", ask)
    grader = graders.Grader("boxed", "last_anywhere", 5.0)
    assert grader.same_class([*towers, *towers]) == [0, 1, 2, 3, 4] * 2
    assert len(asked) <= 1 + 5  # one pair, then each formula alone; 10 pairs without
    assert len(set(asked)) == len(asked)  # each comparison once


def test_a_vote_ends_after_several_time_limits(monkeypatch):
    """Answers that are slow only in pairs are compared as strings once the time is up."""
    clock = [0.0]

    def ask(worker, gold, answer, seconds, strict=True):
        clock[0] += seconds
        return "timeout" if answer != "1" else "unequal"

    monkeypatch.setattr(worker_process.Worker, "ask", ask)
    monkeypatch.setattr(graders.time, "monotonic", lambda: clock[0])
    grader = graders.Grader("boxed", "last_anywhere", 5.0)
    answers = [f"x^{{{k}}}+y" for k in range(30)] + ["7", "7.0", "x^{3}+y"]
    assert grader.same_class(answers) == [*range(30), 30, 30, 3]
    assert clock[0] <= 10 * 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_when_the_main_process_is_killed(tmp_path):
    code = (
        "from copsd_jax.rewards import graders; import time\n"
        "g = graders.Grader('boxed', 'last_anywhere', 60.0, workers=1)\n"
        "g.compare('y', 'x^2+1')\n"
        "print(g._workers[0]._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert os.path.exists(f"/proc/{worker}")
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    while time.monotonic() < end and is_alive(worker):
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
