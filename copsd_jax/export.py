"""Export of a checkpoint to files that other programs can load.

    python -m copsd_jax.export --workdir=W --out=D [--step=12] [--format=peft] [--dtype=float16]
    python -m copsd_jax.export --workdir=W --out=D --format=gguf [--quantize=q8_0]

The result is a Hugging Face folder that transformers and other programs can load. The folder
contains the merged weights (safetensors), the config, the tokenizer and the generation settings.
With `--format=peft`, the result is a PEFT folder that contains only the adapter, the name of its
base model, and the tokenizer. With `--format=base`, the result is the model as it was before
training, without an adapter; a server that samples for a run needs this model.
With `--format=gguf`, the result is one GGUF file with the merged weights and the tokenizer. Each
result has a model card, README.md. With `--push=owner/name`, the folder is also uploaded.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

from copsd_jax.runtime import startup

if __name__ == "__main__":
    startup.begin()  # first, because the imports below take time

import jax
import jax.numpy as jnp

from copsd_jax import model_card
from copsd_jax.model import lora
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import (
    checkpoint,
    evaluation_files,
    failures,
    fingerprints,
    nonfinite,
    storage,
    workdir,
)
from copsd_jax.training import loaded_run, run_plan, train_step
from copsd_jax.weights import gguf_writer, hf, hub, hub_upload, peft, tensor_files

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def parse_export_flags(argv: list[str]) -> argparse.Namespace:
    """Parses the program's flags; argv[0] is the program's name."""
    parser = startup.CommandParser(
        prog=startup.spell_program(argv, "export"),
        description="Writes a run's checkpoint as a Hugging Face model that transformers loads.",
    )
    add = parser.add_argument
    add("--workdir", required=True, type=storage.parse_path, help="a run's directory")
    add("--out", required=True, type=storage.parse_path, help="a new or empty directory")
    add("--step", type=int, default=-1, help="checkpoint; default: the newest")
    add(
        "--format", default="hf", choices=("hf", "peft", "base", "gguf"),
        help="hf: the whole model with the adapter merged (default); peft: the adapter alone; "
        "base: the model before training, without an adapter; gguf: the whole model as one file "
        "for llama.cpp",
    )  # fmt: skip
    add(
        "--quantize", choices=tuple(gguf_writer.KINDS),
        help="type of the matrices with --format=gguf; default: f16",
    )  # fmt: skip
    add(
        "--dtype", choices=tuple(DTYPES),
        help="dtype of the weights in the files; default: the run's dtype, and float32 for peft",
    )  # fmt: skip
    add("--push", help="owner/name: also upload the folder to the Hugging Face Hub")
    add("--public", action="store_true", help="with --push: everybody may read the repository")
    return parser.parse_args(argv[1:])


def _check_out(out: pathlib.Path) -> None:
    """Refuses a directory that is neither new nor empty, or that cannot be created.

    The program writes the files to a temporary directory beside `out`, and then renames the
    temporary directory to `out`.
    """
    workdir.check_writable(out.resolve().parent, "--out", out)
    if out.is_mount():
        raise FileExistsError(f"--out={out} is a mount point: name a directory in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out={out} exists and is not empty")


def main(argv: list[str]) -> int:
    """Runs the program; returns 0 if the model was written, or 2 or 3 after an error message.

    The exit code 3 means that the weights are not finite.
    """
    args = parse_export_flags(argv)
    try:
        config = workdir.load_run_config(args.workdir)
        _check_out(args.out)
        _check_flags(args)
        if args.format == "peft" and config.train.trainable != "lora":
            raise ValueError("--format=peft: train.trainable is full, so there is no adapter")
        plan = run_plan.make_plan(config, train=False, evaluate=False)
        _check_step(args)
        _check_gguf(args, plan)
        _check_push(args, plan)
        with loaded_run.set_mesh_and_precision(plan):
            r, initial = loaded_run.load_run(plan, config.train.steps)
            with r.grader:
                state = initial if args.format == "base" else _load_checkpoint(args, initial)
            step = int(state.step)
            nonfinite.check_finite(state, f"checkpoint {step} of {args.workdir}")
        facts = _collect_facts(args, r, state)
        with storage.explain(args.out):
            _write_export(args, facts, _derive_exported_policy(args, r, state))
        print(f"step {step} of {args.workdir} is in {args.out}", flush=True)
        if args.push:
            said = f"step {step}, exported by copsd_jax"
            print(hub_upload.push_folder(args.out.resolve(), args.push, args.public, said))
    except (ValueError, OSError, nonfinite.NonFinite) as error:
        return failures.report(error)
    return 0


def _name_run_base(plan: run_plan.Plan) -> hub.BaseModel:
    """Returns the name of the model that the run's adapter belongs to."""
    model, start = plan.config.model, plan.start
    if start is not None and not start.is_adapter:  # then the base weights are those of init_from
        return hub.name_base_model(start.folder, start.folder)
    if model.init == "random":
        return hub.BaseModel(model.path, "", False)
    return hub.name_base_model(model.path, plan.weights_path)


def _derive_exported_policy(
    args: argparse.Namespace, r: loaded_run.LoadedRun, state: train_step.State
) -> policy_lib.Policy:
    """Returns the policy to write: with --format=peft with an adapter, otherwise without one.

    For a GGUF file, and if --dtype is not the run's dtype, the weights are float32. They are then
    rounded only once, when they are written.
    """
    given = "float32" if args.format == "gguf" else args.dtype
    same = given is None or DTYPES[given] == r.plan.dtype
    dtype = r.plan.dtype if same else jnp.float32
    student = train_step.derive_policies(state, r.frozen, r.options, dtype)[0]
    if args.format == "peft":
        return student
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), student.params)
    if args.format in ("hf", "gguf") and student.adapter is not None:
        params = lora.merge_adapter(params, student.adapter, student.scale)
    return policy_lib.Policy(params)


def _collect_facts(
    args: argparse.Namespace, r: loaded_run.LoadedRun, state: train_step.State
) -> model_card.CardFacts:
    """Returns the facts of the model card; evaluations of another policy are left out."""
    step, folder = int(state.step), args.workdir
    results: dict[int, dict | None] = {}
    student = loaded_run.derive_run_policies(r, state)[0]
    tree = student.params if student.adapter is None else student.adapter
    for number in dict.fromkeys((0, step)):
        file = workdir.step_file(folder, "eval", number)
        result = evaluation_files.read_evaluation(file) if file.is_file() else None
        policy = (result or {}).get("policy") if number else None
        # A step that was trained again can have another policy than the evaluated one.
        if policy not in (None, fingerprints.fingerprint_arrays(tree)):
            print(f"{file} is the result of another policy: the model card leaves it out")
            result = None
        results[number] = result
    if step and results[step] is None:
        print(
            f"the model card has no scores of step {step}: python -m copsd_jax.evaluate "
            f"--workdir={folder} --steps={step} measures them"
        )
    file = f"model-{args.quantize or 'f16'}.gguf" if args.format == "gguf" else ""
    numbers = (args.quantize or "f16").upper() if file else args.dtype
    numbers = numbers or ("float32" if args.format == "peft" else jnp.dtype(r.plan.dtype).name)
    return model_card.CardFacts(
        r.plan, folder, _name_run_base(r.plan), args.format, step, results[0],
        results[step] if step else None, numbers, address=args.push or ".", file=file,
    )  # fmt: skip


def _write_export(
    args: argparse.Namespace, facts: model_card.CardFacts, student: policy_lib.Policy
) -> None:
    """Writes the adapter of a policy or, without one, the model; adds tokenizer and model card."""
    plan, base = facts.plan, facts.base
    shape, tokenizer = plan.model_config, plan.tokenizer
    with tensor_files.create_weights_folder(args.out.resolve()) as folder, _name_dtype(args):
        if facts.file:
            gguf_writer.write_gguf(
                folder / facts.file, student.params, shape, kind=args.quantize or "f16",
                tok=tokenizer, stop_ids=plan.vocabulary.stop_ids, title=args.out.resolve().name,
            )  # fmt: skip
        elif student.adapter is None:
            hf.write_files(
                folder, student.params, shape, source_path=plan.weights_path, tokenizer=tokenizer,
                stop_ids=plan.vocabulary.stop_ids, dtype=args.dtype and DTYPES[args.dtype],
            )  # fmt: skip
        else:
            peft.write_files(
                folder, student.adapter, shape, alpha=plan.config.lora.alpha, base=base.name,
                revision=base.commit, dtype=DTYPES[args.dtype or "float32"],
            )  # fmt: skip
            hf.save_tokenizer(folder, tokenizer)
        model_card.write_model_card(folder, facts, args.out.resolve().name)


@contextlib.contextmanager
def _name_dtype(args: argparse.Namespace) -> Iterator[None]:
    """Adds the flag to the message if --dtype cannot hold a value."""
    try:
        yield
    except ValueError as error:
        flag = f"--dtype={args.dtype}: " if args.dtype else ""
        raise ValueError(f"{flag}{error}") from error


def _check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that nothing would read."""
    if args.quantize and args.format != "gguf":
        raise ValueError(f"--quantize={args.quantize} needs --format=gguf, not {args.format}")
    if args.public and args.push is None:
        raise ValueError("--public: nothing reads it without --push=owner/name")
    if args.dtype and args.format == "gguf":
        raise ValueError(
            f"--dtype={args.dtype}: nothing reads it with --format=gguf, which has "
            f"--quantize={'|'.join(gguf_writer.KINDS)}"
        )


def _check_push(args: argparse.Namespace, plan: run_plan.Plan) -> None:
    """Refuses an upload that cannot work, or that nobody else could use."""
    if args.push is None:
        return
    base = _name_run_base(plan)
    if args.format == "peft" and not base.is_repository:
        raise ValueError(
            f"--push={args.push}: the base of this adapter, {base.name}, is in no known "
            "repository, so nobody else could load the adapter: use --format=hf"
        )
    hub_upload.check_push(args.push, args.public)


def _check_gguf(args: argparse.Namespace, plan: run_plan.Plan) -> None:
    """Refuses a model that GGUF cannot represent, before any weights are loaded."""
    if args.format != "gguf":
        return
    shape, kind = plan.model_config, args.quantize or "f16"
    try:
        gguf_writer.check_gguf_shape(shape, kind)
        gguf_writer.collect_tokenizer_fields(plan.tokenizer, shape, plan.vocabulary.stop_ids)
    except ValueError as error:
        raise ValueError(f"--format=gguf --quantize={kind}: {error}") from error


def _check_step(args: argparse.Namespace) -> None:
    """Checks that --step fits --format and has a checkpoint, before any weights are loaded."""
    saved = checkpoint.Checkpoints(args.workdir / "checkpoints").steps()
    if args.format == "base":
        if args.step != -1:
            raise ValueError(
                f"--step={args.step}: --format=base writes the model as it was before training"
            )
    elif not saved:
        raise ValueError(f"--workdir={args.workdir} has no checkpoint yet")
    elif args.step not in (-1, *saved):
        raise ValueError(f"--step={args.step}: the checkpoints are {saved}")


def _load_checkpoint(args: argparse.Namespace, initial: train_step.State) -> train_step.State:
    """Loads the checkpoint that --step names, or the newest whole checkpoint."""
    with checkpoint.Checkpoints(args.workdir / "checkpoints") as checkpoints:
        if args.step != -1:
            return checkpoints.load(args.step, initial)
        state = checkpoints.load_newest(initial)
    if state is initial:
        raise ValueError(f"--workdir={args.workdir} has no whole checkpoint")
    return state


if __name__ == "__main__":
    sys.exit(main(sys.argv))
