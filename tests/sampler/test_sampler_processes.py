"""Two processes with two devices each against one process with four: the same texts, everywhere.

Slots over `data`, heads over `tensor`, a shared prefix, and stop strings that the hosts find.
"""

import json
import socket
import subprocess
import sys

import conftest
import pytest

SCRIPT = conftest.ROOT / "tests" / "sampler_process.py"


def together(processes: int) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(processes), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    ended = [(*one.communicate(timeout=240), one.returncode) for one in started]
    assert all(code == 0 for *_, code in ended), ended
    return [json.loads(out.splitlines()[-1]) for out, *_ in ended]


@pytest.mark.slow
def test_every_process_has_every_text_and_they_are_those_of_one():
    (alone,) = together(1)
    first, second = together(2)
    assert first == second == alone
    for (ids, finish, _), limit in zip(alone, [1 + 7 * i % 40 for i in range(36)], strict=True):
        assert len(ids) == limit if finish == "length" else len(ids) <= limit
    assert {finish for _, finish, _ in alone} == {"stop", "length"}
    assert len({tuple(ids) for ids, *_ in alone}) > 20
