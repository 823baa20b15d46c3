"""Runs a bad step of a run again, and names the numbers that are not finite.

    python -m copsd_jax.replay --workdir=W --step=25

A step is bad if its loss or its gradient is not finite, or if the logits of more than half of its
completions were not finite. The program loads the run's weights. From W/bad, it loads the state and
the inputs that the run wrote there. Then it runs the same compiled step. The program needs as many
devices as the run had.

Exit codes: 0 (loss and gradient norm equal those of the run, where NaN equals NaN), 1 (loss or
gradient norm differs), 2 (a file is missing or cannot be used), 3 (the weights of `model.path` are
not finite).
"""

import pathlib
import sys
from typing import Any

from copsd_jax.runtime import startup

if __name__ == "__main__":
    startup.begin()  # first, because the imports below take time

import jax
import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import (
    bad_steps,
    checkpoint,
    failures,
    nonfinite,
    sharding,
    storage,
    workdir,
)
from copsd_jax.teaching import prompts
from copsd_jax.training import layout, loaded_run, rollouts, run_plan, train_step

_SIDE = layout.Side(*range(len(layout.Side._fields)))
# The structure of the tree in the file of a bad step; the leaves are only placeholders.
_CONTENT: dict[str, Any] = {
    "inputs": {
        "batch": layout.Batch(_SIDE, _SIDE, *range(len(layout.Batch._fields) - 2)),
        "student_prefix": 0,
        "lr_factor": 0,
    },
    "results": {"loss": 0, "grad_norm": 0},
}


def main(argv: list[str]) -> int:
    """Runs the program and returns its exit code."""
    parser = startup.CommandParser(
        prog=startup.spell_program(argv, "replay"),
        description="Runs a bad step of a run again, from its files in W/bad.",
    )
    parser.add_argument(
        "--workdir", required=True, type=storage.parse_path, help="a run's directory"
    )
    parser.add_argument("--step", required=True, type=int, help="number of the bad step")
    args = parser.parse_args(argv[1:])
    try:
        storage.check_local("--workdir", args.workdir)
        config = _load_replay_config(args.workdir)
        content, state_path = _read_step(args.workdir, args.step)
        plan = run_plan.make_plan(config, evaluate=False)
        with loaded_run.set_mesh_and_precision(plan):
            _check_shards(content["inputs"]["batch"], plan)
            r, like = loaded_run.load_run(plan, plan.config.train.steps)
            with r.grader:
                state = checkpoint.read_state(state_path, like)
                results, lines = _run_step(r, state, content["inputs"])
    except (ValueError, OSError, nonfinite.NonFinite) as error:
        return failures.report(error)
    same = True
    for name, recorded in content["results"].items():
        same &= np.array_equal(results[name], recorded, equal_nan=True)
        print(f"{name}: {float(results[name])!r}, in the run {float(recorded)!r}")
    print(*lines, sep="\n")
    print(f"step {args.step} of {args.workdir} is {'' if same else 'not '}reproduced")
    return 0 if same else 1


def _read_step(directory: pathlib.Path, step: int) -> tuple[dict, pathlib.Path]:
    """Returns the content of a bad step's file, and the path of the state before the step."""
    path = bad_steps.step_file(directory, step)
    if not path.is_file():
        known = sorted(int(p.stem.removeprefix("step_")) for p in path.parent.glob("step_*.npz"))
        steps = f"the bad steps are {known}" if known else "the run has no bad step"
        raise FileNotFoundError(f"--step={step}: {path} does not exist; {steps}")
    content = bad_steps.read_arrays(path, _CONTENT)
    batch = content["inputs"]["batch"]
    if batch.teacher.tokens_BL is None:
        content["inputs"]["batch"] = batch._replace(teacher=None)
    return content, bad_steps.find_state(directory, step)


def _load_replay_config(directory: pathlib.Path) -> config_lib.Config:
    """Returns the run's settings, including the mesh, for one process that samples nothing."""
    config = workdir.load_run_config(directory)
    # Another mesh or another form of attention would add the same numbers in another order.
    own = workdir.read_all_settings(directory)
    config.mesh.update({axis: own[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")})
    config.model.attention = own["model.attention"]
    config.mesh.update(coordinator="", processes=1, process=0)
    config.sampler.update(config_lib.default().sampler)
    return config


def _check_shards(batch: layout.Batch, plan: run_plan.Plan) -> None:
    """Refuses a packed batch that was packed for another number of devices."""
    if batch.source_UST is None:
        return
    packed, here = batch.source_UST.shape[1], sharding.batch_shards(plan.mesh)
    if packed != here:
        raise ValueError(f"the run split a batch over {packed} devices, but there are {here} here")


def _run_step(
    r: loaded_run.LoadedRun, state: train_step.State, inputs: dict
) -> tuple[dict, list[str]]:
    """Runs a step; returns its metrics, and lines that name the numbers that are not finite."""
    plan, row = r.plan, r.plan.rows[0]
    asked = prompts.build_student_prompt(plan.tokenizer, plan.student, row)
    taught = config_lib.traits(plan.config).teacher
    told = plan.teacher.build_shortest(row) if taught else None
    teacher_kv = rollouts.encode_training_prefixes(r, state, asked, told)[1]
    batch = layout.place_batch(inputs["batch"], plan.mesh)
    args = (r.frozen, batch, inputs["student_prefix"], teacher_kv)
    _, gradient, _ = jax.jit(train_step.make_gradient(r.decoder, r.options))(state, *args)
    lines = [
        f"not finite in the state: {_join_replay_items(nonfinite.find_nonfinite(state._asdict()))}",
        f"not finite in the inputs: {_join_replay_items(nonfinite.find_nonfinite(inputs))}",
        f"not finite in the gradient: {_join_replay_items(_describe_replayed_gradient(gradient))}",
    ]
    _, aux = r.step(state, *args, inputs["lr_factor"])
    aux = jax.device_get(aux)
    tokens = _join_replay_items(_describe_replayed_tokens(aux, inputs["batch"]))
    lines.append(f"not finite in completions: {tokens}")
    return aux.metrics, lines


def _join_replay_items(items: list[str]) -> str:
    return ", ".join(items) or "none"


def _describe_replayed_gradient(gradient: dict) -> list[str]:
    """Describes the non-finite arrays of a gradient, with their layers if they have any.

    Adapters, and all parameters named `layers/...`, have a leading axis for the layers.
    """
    out = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient)):
        if not (lost := ~np.isfinite(leaf)).any():
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        count = f"{int(lost.sum()):,} of {leaf.size:,}"
        if name.startswith("layers/") or name.endswith(("/a", "/b")):
            layers = np.flatnonzero(lost.reshape(len(leaf), -1).any(axis=1)).tolist()
            count += f" in layers {layers}"
        out.append(f"{name} ({count})")
    return out


def _describe_replayed_tokens(aux: train_step.Aux, batch: layout.Batch) -> list[str]:
    """Lists the tokens of each completion at which a value is not finite."""
    lost_BC = np.zeros(batch.mask_BC.shape, bool)
    for value_BC in jax.tree.leaves((aux.tokens, aux.policy)):
        lost_BC |= ~np.isfinite(value_BC) & batch.mask_BC
    return [
        f"completion {b} (tokens {np.flatnonzero(lost_C).tolist()})"
        for b, lost_C in enumerate(lost_BC)
        if lost_C.any()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
