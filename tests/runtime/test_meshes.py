"""One device against eight in every kind of mesh, and against two processes of four devices each.

Three plain SGD steps in float32 with an adapter that is not zero (tests/mesh_process.py, each mesh
in processes of its own): the rows and the sampled tokens are the same, losses and gradients equal
to rounding, and so is the change of the parameters.
"""

import pathlib
import socket
import subprocess
import sys

import conftest
import numpy as np
import pytest

SCRIPT = conftest.ROOT / "tests" / "mesh_process.py"
ONE = (1, 1, 1)


def outcome(
    folder: pathlib.Path, card: str, sizes: tuple[int, int, int], processes: int = 1,
    script: pathlib.Path = SCRIPT, more: tuple[str, ...] = (),
):  # fmt: skip
    """What the script wrote, by name; `more` are further arguments of the script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / f"{card}_{'_'.join(map(str, sizes))}_{processes}.npz"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), card, *map(str, sizes), str(file), str(rank),
             str(processes), str(port), *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    said = [one.communicate(timeout=280)[0] for one in started]
    assert [one.returncode for one in started] == [0] * processes, said[0][-3000:]
    with np.load(file) as values:
        return dict(values)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outcome on one device, by card; each is run once."""
    known = {}

    def of(card: str):
        if card not in known:
            known[card] = outcome(tmp_path_factory.mktemp("one"), card, ONE)
        return known[card]

    return of


def close(one: dict, many: dict, terms: float) -> None:
    """The bounds: 1e-5 of the loss and of each gradient's norm, 1e-4 of each change's norm.

    `terms`: the size of what the loss is the sum of, where that is more than the loss.
    """
    assert one.keys() == many.keys()
    bounds = {"loss": 1e-5, "gradient": 1e-5, "change": 1e-4}
    for name, expected in one.items():
        kind = name.split()[0]
        if kind in ("rows", "tokens"):
            np.testing.assert_array_equal(many[name], expected, err_msg=name)
            continue
        norm = np.linalg.norm(np.asarray(expected, np.float64))
        assert norm > 1e-5, name
        norm = max(norm, terms) if kind == "loss" else norm
        gap = np.linalg.norm(np.asarray(many[name], np.float64) - expected)
        assert gap <= bounds[kind] * norm, (name, gap / norm)


CASES = {
    "8-1-1": ((8, 1, 1), 1), "1-8-1": ((1, 8, 1), 1), "2-2-2": ((2, 2, 2), 1),
    "1-1-8": ((1, 1, 8), 1), "2-2-2_two": ((2, 2, 2), 2), "8-1-1_two": ((8, 1, 1), 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("card", ["copsd", "sdpo"])
@pytest.mark.parametrize(("sizes", "processes"), CASES.values(), ids=CASES)
def test_a_mesh_changes_nothing(alone, tmp_path, card, sizes, processes):
    one = alone(card)
    assert len({name for name in one if name.startswith("gradient")}) == 14
    assert len({tuple(row) for row in one["tokens 0"].tolist()}) > 8
    # Surrogates of one group are of size one, and cancel but for rounding.
    close(one, outcome(tmp_path, card, sizes, processes), 1.0 if card == "sdpo" else 0.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_is_restored_on_other_meshes_and_processes(tmp_path):
    """Saved on (2, 2, 2); the arrays are the same, and the next loss is, to rounding."""
    script, folder = SCRIPT.with_name("restore_process.py"), str(tmp_path / "checkpoints")
    saved = outcome(tmp_path, "copsd", (2, 2, 2), script=script, more=(folder, "save"))
    assert np.abs(saved[".trained['q']['b']"]).max() > 1e-5
    for sizes, processes in (((8, 1, 1), 1), (ONE, 1), ((2, 2, 2), 2)):
        found = outcome(tmp_path, "copsd", sizes, processes, script, (folder, "load"))
        assert found.keys() == saved.keys()
        for name, expected in saved.items():
            if name != "loss":
                np.testing.assert_array_equal(found[name], expected, err_msg=f"{name} {sizes}")
        np.testing.assert_allclose(found["loss"], saved["loss"], atol=1e-6, rtol=0)
