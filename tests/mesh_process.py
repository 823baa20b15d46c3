"""Three plain SGD steps of a run on a mesh; the leading process writes down what came out.

Run as: mesh_process.py CARD DATA FSDP TENSOR FILE [RANK PROCESSES PORT], with eight CPU devices in
all, one for a mesh of one. FILE becomes an npz: ids of rows and sampled tokens of each step, loss
of each step, gradient of the first and change of the parameters after the last, leaf by leaf.
"""

import os
import sys

CARD, FILE = sys.argv[1], sys.argv[5]
SIZES = tuple(map(int, sys.argv[2:5]))
RANK, PROCESSES, PORT = map(int, sys.argv[6:9] or (0, 1, 0))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import runs

DEVICES = 1 if SIZES == (1, 1, 1) else 8
jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
if PROCESSES > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", num_processes=PROCESSES, process_id=RANK)

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import row_attention
from copsd_jax.methods import table
from copsd_jax.model import transformer
from copsd_jax.problems import batches, languages
from copsd_jax.runtime import sharding
from copsd_jax.training import builders, layout, loaded_run, run_plan, train_step

# Eight query heads, so that `tensor` may be eight; the two key heads are then repeated.
transformer.SHAPES["tiny"] = dataclasses.replace(transformer.SHAPES["tiny"], n_heads=8)
STEPS, RATE = 3, 0.3
if CARD == "copsd":
    row_attention.SMALL_WORK = 0  # blocks of queries also where rows are small
SETTINGS = {
    # Two micro-batches of eight completions.
    "copsd": {"train__batch": 16, "train__micro_batch": 8, "rollout__max_tokens": 8},
    # Groups of eight with a reward that differs within them, under both terms of the loss, in
    # packed rows that share their prompts.
    "sdpo": {
        "train__batch": 2, "train__micro_batch": 8, "rollout__per_prompt": 8,
        "train__pack": "shared", "rollout__max_tokens": 8, "policy__weight": 0.5,
        "reward__kind": "runs:by_text",
    },
}  # fmt: skip


def recorded() -> optax.GradientTransformation:
    """Plain SGD whose state is the gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(lambda g: -RATE * g, grads), grads),
    )


def begun(plan: run_plan.Plan, state: train_step.State, tx) -> train_step.State:
    """The State whose adapter's b, which is born as 0, is drawn from a seed instead."""
    draw = np.random.default_rng(5)
    trained = {
        name: {"a": leaf["a"], "b": 0.05 * draw.standard_normal(leaf["b"].shape, np.float32)}
        for name, leaf in sorted(state.trained.items())
    }
    places = sharding.shardings(trained, plan.mesh, plan.model_config.n_kv_heads)
    trained = jax.tree.map(
        lambda x, place: x if isinstance(x, jax.Array) else sharding.shard_array(x, place),
        trained,
        places,
    )
    return loaded_run._create_on_shards(
        lambda tree: train_step.init_train_state(tree, tx, "fixed"), plan, trained
    )  # fmt: skip


def whole(tree, devices) -> dict[str, np.ndarray]:
    """Each leaf on every process, by its path."""
    everywhere = NamedSharding(devices, PartitionSpec())
    tree = jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(tree))
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def main() -> None:
    names = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), SIZES, strict=True))
    plan = run_plan.make_plan(runs.config(CARD, **SETTINGS[CARD], **names))
    c, out = plan.config, {}
    with loaded_run.set_mesh_and_precision(plan):
        r, state = loaded_run.load_run(plan, STEPS)
        tx = recorded()
        state = begun(plan, state, tx)
        step = builders.build_step(plan, r.decoder, tx, r.options, state)
        method = table.METHODS[c.method]
        codes = [languages.resolve_code(code, plan.student.languages) for code in c.data.lang]
        order = batches.iterate_batches(
            plan.rows, codes, c.data.weights, c.train.batch, c.seed, step=0
        )
        with r.grader:
            for k in range(STEPS):
                rows = next(order)
                work = method.make_batch(r, state, rows, k)
                batch = layout.place_batch(builders.pack_batch(plan, work.batch), plan.mesh)
                state, aux = step(state, r.frozen, batch, work.student_prefix, work.teacher_kv, 1.0)
                out[f"rows {k}"] = np.array([row.id for row in rows])
                out[f"tokens {k}"] = work.batch.completion_BC
                out[f"loss {k}"] = np.asarray(jax.device_get(aux.metrics["loss"]))
                if k == 0:
                    grads = whole(state.optimizer, plan.mesh)
                    out |= {f"gradient {name}": x for name, x in grads.items()}
                    start = whole(begun(plan, state, tx).trained, plan.mesh)
        for name, x in whole(state.trained, plan.mesh).items():
            out[f"change {name}"] = x - start[name]
    if jax.process_index() == 0:
        np.savez(FILE, **out)


if __name__ == "__main__":
    main()
