"""Runs this package's training step, and times its parts, for benchmarks/step.py.

    python benchmarks/step_ours.py prepare work.json   writes problems, weights and an adapter
    python benchmarks/step_ours.py work.json           runs steps

The second command prints a line of JSON when the run is loaded. Then it prints one line for each
line of standard input: "step", "profile" (a step with a trace), "parts" (single parts as programs)
or "end".
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_memory

from copsd_jax import main
from copsd_jax.config import settings
from copsd_jax.losses import divergence_loss, loss_norms
from copsd_jax.methods import distill, table
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.problems import bundled, problem_row
from copsd_jax.runtime import malloc, sharding
from copsd_jax.sampler import loop
from copsd_jax.teaching import contexts, prompts, teacher_side
from copsd_jax.training import (
    builders,
    layout,
    loaded_run,
    micro_batches,
    rollout_records,
    run_plan,
    train_step,
)
from copsd_jax.weights import hf

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILLERS = (" one", " the", " a", " x", ".", "!", "x")  # each is one token in some tokenizer
ADAPTER_SCALE = 0.02  # standard deviation of the adapter's b; training starts with b = 0


# --- the work of both systems -----------------------------------------------------------------


def card(work: dict) -> settings.Config:
    """Returns the settings of a run that does this work."""
    size = work["model"]
    argv = ["main", f"--config={ROOT / 'configs' / 'opsd.py'}:{size['preset']}", *work["settings"]]
    c = main.parse_command(argv)[0]
    c.model.path, c.model.init, c.model.shape = size["path"], size["init"], size["shape"]
    c.model.dtype = work["dtype"]
    c.data.path, c.eval.path = work["problems"], ""
    c.prompt.template, c.prompt.exemplars = "plain", 0
    c.prompt.thinking = c.teacher.thinking = c.eval.thinking = "none"
    c.rollout.max_tokens, c.rollout.stop = work["completion"], ()
    c.rollout.temperature, c.rollout.slots = 1.0, work["batch"]
    c.loss.divergence, c.loss.beta = work["divergence"], work["beta"]
    c.train.batch, c.train.steps = work["batch"], 10**6
    c.train.schedule, c.train.warmup = "constant", 0
    c.lora.rank, c.lora.alpha = work["rank"], 2.0 * work["rank"]
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = work["mesh"]
    return c


def fitted(length: Callable[[str], int], start: str, wanted: int) -> str:
    """Returns `start` followed by fillers, such that length(text) is `wanted`.

    Raises:
      ValueError: if `start` alone is longer, or no filler is exactly one token.
    """
    missing = wanted - length(start)
    if missing < 0:
        raise ValueError(f"{wanted} tokens are too few: the text alone has {wanted - missing}")
    for filler in FILLERS:
        text = start + filler * missing
        if length(text) == wanted:
            return text
    raise ValueError(f"none of {FILLERS} fills a text up to {wanted} tokens")


def write_problems(work: dict, file: pathlib.Path) -> None:
    """Writes bundled problems and solutions, extended so that prompts have the wanted lengths."""
    with open(bundled.find_file("train"), encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(work["batch"])]
    write_rows(file, rows)  # the plan below reads this file; it has the templates and tokenizer
    plan = run_plan.make_plan(card(work), evaluate=False)
    made = []
    for raw, row in zip(rows, plan.rows, strict=True):
        asked = functools.partial(_length, plan, row, "problem")
        problem = fitted(asked, raw["problem"], work["prompt"])
        told = functools.partial(
            _length, plan, dataclasses.replace(row, problem=problem), "solution"
        )
        solution = fitted(told, raw["solution"], work["teacher"])
        made.append(raw | {"problem": problem, "solution": solution})
    write_rows(file, made)


def _length(plan: run_plan.Plan, row: problem_row.Row, field: str, text: str) -> int:
    """Counts the tokens of a student's prompt with a problem, or a teacher's with a solution."""
    row = dataclasses.replace(row, **{field: text})
    if field == "solution":
        return plan.teacher.build_shortest(row).length
    return prompts.build_student_prompt(plan.tokenizer, plan.student, row).length


def write_rows(file: pathlib.Path, rows: list[dict]) -> None:
    names = ("id", "problem", "solution", "answer")
    lines = [json.dumps({name: row[name] for name in names}) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def begin(file: pathlib.Path) -> dict:
    """Reads the work, and sets up memory as in `main` and the number of CPU devices."""
    malloc.keep_freed_memory()
    work = json.loads(file.read_text(encoding="utf-8"))
    if work["devices"]:
        jax.config.update("jax_num_cpu_devices", work["devices"])
    return work


def prepare(file: pathlib.Path) -> None:
    """Writes problems, weights and adapter; adds their paths and the prompts to work.json."""
    work = begin(file)
    work["problems"] = str(file.parent / "problems.jsonl")
    write_problems(work, pathlib.Path(work["problems"]))
    plan = run_plan.make_plan(card(work), evaluate=False)
    with loaded_run.set_mesh_and_precision(plan):
        r, state = loaded_run.load_run(plan, 1)
        folder = hf.save(
            file.parent / "weights", jax.device_get(r.frozen), plan.model_config,
            source_path=plan.weights_path, tokenizer=plan.tokenizer,
        )  # fmt: skip
        rng = np.random.default_rng(work["seed"])
        adapter = {
            f"{name}/{factor}": np.asarray(x) if factor == "a"
            else ADAPTER_SCALE * rng.standard_normal(x.shape).astype(np.float32)
            for name, leaf in state.trained.items() for factor, x in leaf.items()
        }  # fmt: skip
    np.savez(file.parent / "adapter.npz", allow_pickle=False, **adapter)
    ask = lambda row: prompts.build_student_prompt(plan.tokenizer, plan.student, row)  # noqa: E731
    tell = lambda row: plan.teacher.build_shortest(row)  # noqa: E731
    ids = {
        name: [[*p.prefix_ids, *p.ids] for p in map(make, plan.rows)]
        for name, make in (("student_prompts", ask), ("teacher_prompts", tell))
    }
    c = plan.config.train
    work |= ids | {
        "weights": str(folder), "adapter": str(file.parent / "adapter.npz"),
        "adapter_scale": plan.adapter_scale, "max_grad_norm": c.max_grad_norm,
        "optimizer": {name: c[name] for name in ("lr", "b1", "b2", "eps", "weight_decay")},
        "shape": dataclasses.asdict(plan.model_config) | {
            "projections": plan.model_config.projections()},
    }  # fmt: skip
    work["model"] |= {"path": str(folder), "init": "pretrained", "shape": ""}
    file.write_text(json.dumps(work), encoding="utf-8")


# --- a step -------------------------------------------------------------------------------------


class Parts:
    """Wall and processor seconds of each part of a step; a nested part counts only for itself."""

    def __init__(self):
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._inner = [[0.0, 0.0]]  # per open part: the seconds of the parts nested in it

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._inner.append([0.0, 0.0])
        try:
            yield
        finally:
            took = time.perf_counter() - wall, time.process_time() - cpu
            inner = self._inner.pop()
            for total, own, within in zip((self.wall, self.cpu), took, inner, strict=True):
                total[part] = total.get(part, 0.0) + own - within
            self._inner[-1] = [a + b for a, b in zip(self._inner[-1], took, strict=True)]

    def around(self, part: str, call: Callable) -> Callable:
        """Wraps `call`, so that its time is added to the part."""

        def timed(*args: Any, **settings: Any) -> Any:
            with self(part):
                return call(*args, **settings)

        return timed


class Trainer:
    """A loaded run; a step does the work of a step of `train`, without saving and printing."""

    def __init__(self, work: dict):
        self.work = work
        plan = run_plan.make_plan(card(work), evaluate=False)
        ends = dataclasses.replace(plan.vocabulary, stop_ids=())  # completions have full length
        self.plan = dataclasses.replace(plan, vocabulary=ends)
        self.parts = Parts()
        self.number = 0
        self._program: Any = None

    def load(self) -> None:
        """Loads the weights, and the adapter with which all systems start."""
        r, self.state = loaded_run.load_run(self.plan, 10**6)
        saved = np.load(self.work["adapter"])
        adapter = {
            name: {factor: saved[f"{name}/{factor}"] for factor in "ab"}
            for name in self.state.trained
        }
        self.state = self.state._replace(
            trained=sharding.shard_by_name(
                adapter, self.plan.mesh, self.plan.model_config.n_kv_heads
            )
        )
        hand_over: Any = self.parts.around("hand_over", r.hand_over)
        self.r = dataclasses.replace(r, hand_over=hand_over)
        for owner, name, part in (
            (loop, "generate", "rollout"), (teacher_side.TeacherSide, "build", "contexts"),
            (contexts, "join_privileged_text", "contexts"),
            (distill, "_build_distilled_attempts", "contexts"),
            (layout, "build_batch", "packing"), (layout, "pack_rows", "packing"),
            (layout, "place_batch", "packing"),
        ):  # fmt: skip
            setattr(owner, name, self.parts.around(part, getattr(owner, name)))

    def step(self) -> dict:
        """Runs one step; returns its times, loss, gradient norm, completions and memory."""
        self.parts.wall.clear()
        self.parts.cpu.clear()
        first = self._program is None
        with self.parts("host"):
            wall, cpu = time.perf_counter(), time.process_time()
            method = table.METHODS["distill"]
            rows: list[problem_row.Row] = list(self.plan.rows)
            made = method.make_batch(self.r, self.state, rows, self.number)
            batch = layout.place_batch(builders.pack_batch(self.plan, made.batch), self.plan.mesh)
            args = (self.r.frozen, batch, made.student_prefix, made.teacher_kv, np.float32(1))
            if first:
                self._program = self.r.step.lower(self.state, *args).compile()
            with self.parts("training"):
                self.state, aux = self._program(self.state, *args)
                jax.block_until_ready(self.state)
            aux = jax.device_get(aux)
            values = {
                **rollout_records.drop_empty_means(self.r.options.policy, aux.metrics),
                **made.metrics, **rollout_records.add_rollout_token_values(self.r, made, aux),
            }  # fmt: skip
            took = time.perf_counter() - wall, time.process_time() - cpu
        self.number += 1
        self.batch = batch
        ids = [record["completion_ids"] for record in made.records]
        assert {len(x) for x in ids} == {self.work["completion"]}
        return {
            "seconds": took[0], "cpu_seconds": took[1],
            "parts": dict(self.parts.wall), "cpu_parts": dict(self.parts.cpu),
            "loss": values["loss"], "grad_norm": values["grad_norm"], "completions": ids,
            "logp_gap_max": values["logp_gap_max"], "memory": step_memory.peak(),
            "temporary_bytes": self._program.memory_analysis().temp_size_in_bytes,
            "rows": {"student": batch.student.tokens_BL.shape,
                     "teacher": batch.teacher.tokens_BL.shape},
        }  # fmt: skip


# --- single parts -------------------------------------------------------------------------------


def programs(t: Trainer) -> dict[str, tuple[Callable, tuple]]:
    """Returns {part: (function, arguments)} for the parts of a micro-batch, and for the update."""
    options, decoder, settings = t.r.options, t.r.decoder, t.r.options.divergence
    state, frozen, n = t.state, t.r.frozen, t.r.options.micro_batches
    tx = builders.build_optimizer(t.plan.config, 10**6)[0]
    assert settings is not None
    policies = lambda trained, frozen: train_step.derive_policies(  # noqa: E731
        state._replace(trained=trained), frozen, options, decoder.dtype
    )
    micro = jax.jit(
        lambda batch: jax.tree.map(lambda x: x[0], micro_batches.split_batch(batch, n))
    )(t.batch)

    def states(policy: policy_lib.Policy, side: layout.Side) -> jax.Array:
        return train_step._compute_side_states(decoder, [(policy, side, None)])[0]

    def teacher(trained, frozen, side):
        return states(policies(trained, frozen)[1], side)

    def student(trained, frozen, side, slope_TD):
        hidden_TD, back = jax.vjp(lambda x: states(policies(x, frozen)[0], side), trained)
        return hidden_TD, back(slope_TD)

    def loss(frozen, hidden_s_TD, hidden_t_TD, micro):
        weight_T = loss_norms.compute_token_weights(micro.loss_BC, options.norm).reshape(-1)
        value = lambda hidden_TD: divergence_loss.divergence(  # noqa: E731
            hidden_TD, hidden_t_TD, transformer.get_head(frozen), transformer.get_head(frozen),
            micro.completion_BC.reshape(-1), weight_T, settings,
            implementation=options.implementation, chunk=options.chunk,
            live_T=micro.mask_BC.reshape(-1),
            logp_rollout_T=micro.logp_rollout_BC.reshape(-1),
            kernel=divergence_loss.KernelOptions(chip=options.chip),
        )  # fmt: skip
        return jax.value_and_grad(value, has_aux=True)(hidden_s_TD)

    def update(state, gradient):
        updates, opt_state = tx.update(gradient, state.optimizer, state.trained)
        return optax.apply_updates(state.trained, updates), opt_state

    hidden_t_TD = jax.jit(teacher)(state.trained, frozen, micro.teacher)
    hidden_s_TD = jax.jit(teacher)(state.trained, frozen, micro.student)
    return {
        "teacher": (teacher, (state.trained, frozen, micro.teacher)),
        "student": (student, (state.trained, frozen, micro.student, hidden_s_TD)),
        "loss": (loss, (frozen, hidden_s_TD, hidden_t_TD, micro)),
        "update": (update, (state, jax.tree.map(jnp.ones_like, state.trained))),
    }


def parts(t: Trainer, repetitions: int) -> dict:
    """Times a step's parts as separate programs; returns the least seconds of the repetitions."""
    packed = t.batch.source_UST
    micro = t.r.options.micro_batches if packed is None else len(packed)
    wall, cpu, temporary = {}, {}, {}
    for name, (function, args) in programs(t).items():
        compiled = jax.jit(function).lower(*args).compile()
        took = []
        for _ in range(repetitions + 1):
            begun = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(*args))
            took.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        times = 1 if name == "update" else micro
        wall[name], cpu[name] = (times * min(x[i] for x in took[1:]) for i in (0, 1))
        memory: Any = compiled.memory_analysis()
        temporary[name] = memory.temp_size_in_bytes
    return {"parts": wall, "cpu_parts": cpu, "temporary_bytes": temporary}


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Measures the FLOP/s of a product of square matrices; best of 7."""
    a = jnp.ones((size, size), dtype)
    product, seconds = jax.jit(jnp.dot), []
    for _ in range(8):
        begun = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds[1:])


def serve(file: pathlib.Path) -> None:
    """Loads the run, and answers each line of standard input with a line of JSON."""
    t = Trainer(begin(file))
    with loaded_run.set_mesh_and_precision(t.plan):
        t.load()
        known = {
            "loaded": step_memory.now(), "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(), "platform": jax.devices()[0].platform,
            "versions": {"jax": jax.__version__},
        }  # fmt: skip
        print(json.dumps(known), flush=True)
        with t.r.grader:
            for line in sys.stdin:
                print(json.dumps(_answer(t, json.loads(line))), flush=True)


def _answer(t: Trainer, asked: str) -> dict:
    if asked == "step":
        return t.step()
    if asked == "profile":
        with jax.profiler.trace(t.work["profile"]):
            return t.step()
    if asked == "parts":
        return parts(t, t.work["repetitions"])
    return {"matmul_rate": matmul_rate(t.work["dtype"])}


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        try:
            prepare(pathlib.Path(sys.argv[2]))
        except ValueError as error:
            sys.exit(f"error: {error}")
    else:
        serve(pathlib.Path(sys.argv[1]))
