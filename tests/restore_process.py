"""Two steps on a mesh, with a checkpoint between them; `load` begins with the checkpoint.

Run as: restore_process.py CARD DATA FSDP TENSOR FILE RANK PROCESSES PORT CHECKPOINTS save|load. The
first arguments are those of mesh_process.py. FILE becomes an npz: every leaf of the State after the
first step, and the loss of the second.
"""

import pathlib
import sys

import mesh_process  # it sets up JAX, so it comes before all others

# isort: split
import jax
import numpy as np
import runs

from copsd_jax.methods import table
from copsd_jax.problems import batches, languages
from copsd_jax.runtime import checkpoint
from copsd_jax.training import builders, layout, loaded_run, run_plan

FOLDER, SAVES = pathlib.Path(sys.argv[9]), sys.argv[10] == "save"


def main() -> None:
    names = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh_process.SIZES, strict=True))
    settings = mesh_process.SETTINGS[mesh_process.CARD] | {"teacher__weights": "ema"}
    plan = run_plan.make_plan(runs.config(mesh_process.CARD, **settings, **names))
    c = plan.config
    with (
        loaded_run.set_mesh_and_precision(plan),
        jax.numpy_dtype_promotion("standard"),  # AdamW relies on promotion
        checkpoint.Checkpoints(FOLDER, writer=SAVES) as checkpoints,
    ):
        r, state = loaded_run.load_run(plan, 3)
        codes = [languages.resolve_code(code, plan.student.languages) for code in c.data.lang]

        def step(state):
            number = int(state.step)
            order = batches.iterate_batches(
                plan.rows, codes, c.data.weights, c.train.batch, c.seed, step=number
            )
            work = table.METHODS[c.method].make_batch(r, state, next(order), number)
            batch = layout.place_batch(builders.pack_batch(plan, work.batch), plan.mesh)
            return r.step(state, r.frozen, batch, work.student_prefix, work.teacher_kv, 1.0)

        with r.grader:
            if SAVES:
                state, _ = step(state)
                checkpoints.save(1, state)
            else:
                state = checkpoints.load(1, state)
            out = mesh_process.whole(state, plan.mesh)
            _, aux = step(state)
    out["loss"] = np.asarray(jax.device_get(aux.metrics["loss"]))
    if jax.process_index() == 0:
        np.savez(mesh_process.FILE, **out)


if __name__ == "__main__":
    main()
