"""What will run: settings, problems, shapes, tokenizer and prompts, checked without any weight.

`make` refuses what cannot work, in seconds and in one sentence, and writes nothing.
"""

import collections
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from copsd_jax import config as config_lib
from copsd_jax import (
    contexts,
    data,
    hf,
    hub,
    languages,
    lora,
    mesh,
    model,
    prompts,
    tokenizer,
    workdir,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that can be carried out, without its weights."""

    config: config_lib.Config
    mesh: Mesh
    dtype: Any  # of base weights and compute
    weights_path: pathlib.Path
    model_config: model.ModelConfig
    tokenizer: prompts.Tokenizer
    token_bytes: list[bytes]
    stop_ids: tuple[int, ...]
    valid_V: np.ndarray
    rows: list[data.Row]
    eval_rows: list[data.Row]
    dropped: collections.Counter  # of training rows, by reason
    eval_dropped: collections.Counter
    student: prompts.Spec
    teacher: prompts.Spec
    evaluation: prompts.Spec
    context: contexts.Settings
    adapter_scale: float
    longest: dict[str, int]  # tokens of the longest prompt of each side


def make(config: config_lib.Config, *, train: bool = True, evaluate: bool = True) -> Plan:
    """Checks a config against files, shapes and devices; reads no weights, writes nothing.

    Args:
      train: with the problems to train on; without, the plan has none.
      evaluate: with the problems to evaluate on.

    Raises:
      ValueError, OSError: in one sentence.
    """
    config_lib.validate(config)
    registry = languages.load(config.languages_file)
    _check_languages(config, registry)
    context = contexts.Settings(
        config.context.kind, config.context.problem_en, config.context.solution
    )
    # The cheap checks first: files of problems, then devices, then the model's headers.
    rows, dropped = _train_rows(config, context, registry) if train else _none()
    eval_rows, eval_dropped = _eval_rows(config, registry) if evaluate else _none()
    exemplars = _exemplars(config, registry)
    devices = mesh.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if train:
        config_lib.check_mesh(config, mesh.batch_shards(devices))
    path, model_config, tok = _model(config)
    config_lib.check_vocabulary(config, model_config.vocab_size)
    # Refuses a mesh that does not divide a parameter.
    mesh.shardings(model.abstract(model_config, jnp.float32), devices)
    mesh.shardings(trained_shapes(config, model_config), devices)
    student, teacher, evaluation = (
        prompts.Spec(config.prompt.template, thinking, config.prompt.answer, registry, exemplars)
        for thinking in (config.prompt.thinking, config.teacher.thinking, config.eval.thinking)
    )
    for name, side in (("prompt", student), ("teacher", teacher), ("eval", evaluation)):
        prompts.check_thinking(tok, side.template, side.thinking, f"{name}.thinking")
    ask = functools.partial(prompts.student, tok, student)
    tell = functools.partial(contexts.teach, tok, teacher, context)
    examine = functools.partial(prompts.student, tok, evaluation)
    rows, longest_s = _fitting(rows, ask, "prompt", config, dropped)
    rows, longest_t = _fitting(rows, tell, "teacher", config, dropped)
    eval_rows, longest_e = _fitting(eval_rows, examine, "prompt", config, eval_dropped)
    longest = {"student": longest_s, "teacher": longest_t, "evaluation": longest_e}
    if train:
        _check_shares(config, rows, registry)
    if contexts.asks(context):
        lengths = (contexts.ask(tok, teacher, context, row).length for row in rows)
        longest["analysis"] = max(lengths, default=0)
    _check_lengths(config, model_config, longest)
    for row in rows[:1]:
        prompts.check_states(ask(row), tell(row), config.parity.template_mismatch)
    if config.model.init == "pretrained":
        # Last: of a repository, everything else is refused before its weights are downloaded.
        path = hub.resolve(config.model.path, config.model.revision)
        hf.check(path, model_config)
    auto = jnp.float32 if mesh.platform(devices) == "cpu" else jnp.bfloat16
    dtypes = {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return Plan(
        config=config,
        mesh=devices,
        dtype=dtypes[config.model.dtype],
        weights_path=path,
        model_config=model_config,
        tokenizer=tok,
        token_bytes=tokenizer.token_bytes(tok),
        stop_ids=tokenizer.stop_ids(tok, path),
        valid_V=tokenizer.valid_ids(tok, model_config.vocab_size),
        rows=rows,
        eval_rows=eval_rows,
        dropped=dropped,
        eval_dropped=eval_dropped,
        student=student,
        teacher=teacher,
        evaluation=evaluation,
        context=context,
        adapter_scale=config.lora.alpha / config.lora.rank,
        longest=longest,
    )


def saved_config(directory: pathlib.Path) -> config_lib.Config:
    """The config of a work directory.

    Raises:
      FileNotFoundError: no run there.
      ValueError: it has settings that this version lacks, or lacks some.
    """
    config, saved = config_lib.default(), workdir.read_settings(directory)
    unknown = saved.keys() - config_lib.flat(config).keys()
    if unknown:
        raise ValueError(
            f"--workdir={directory} was written by another version: it has {sorted(unknown)}"
        )
    for name, value in saved.items():
        section, _, key = name.rpartition(".")
        node = config[section] if section else config
        node[key] = tuple(value) if isinstance(value, list) else value
    # Of this machine's devices, whatever the run had: no number depends on it.
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _none() -> tuple[list[data.Row], collections.Counter]:
    return [], collections.Counter()


def _fields(path: str, fields: str) -> str:
    """The field map of a source; bundled files have our names already."""
    return "" if path.startswith("bundled:") else fields


def _check_languages(config: config_lib.Config, registry) -> None:
    named = {
        "data.lang": config.data.lang,
        "eval.lang": config.eval.lang,
        "prompt.exemplars_lang": (config.prompt.exemplars_lang,),
    }
    for setting, codes in named.items():
        for code in codes:
            try:
                languages.resolve(code, registry)
            except ValueError as error:
                raise ValueError(f"{setting} is {code!r}: {error}") from error


def _check_shares(config: config_lib.Config, rows: list[data.Row], registry) -> None:
    """Every language with a share needs a row."""
    weights = tuple(config.data.weights) or (1.0,) * len(config.data.lang)
    found = {row.lang for row in rows}
    for code, weight in zip(config.data.lang, weights, strict=True):
        if weight and languages.resolve(code, registry) not in found:
            raise ValueError(f"data.lang is {code!r}: no row is left in that language")


def _train_rows(config, context, registry) -> tuple[list[data.Row], collections.Counter]:
    return data.load(
        config.data.path, config.data.lang, missing=config.data.missing,
        fields=_fields(config.data.path, config.data.fields),
        needs=contexts.needs(context), limit=config.data.limit, registry=registry,
    )  # fmt: skip


def _eval_rows(config, registry) -> tuple[list[data.Row], collections.Counter]:
    if not config.eval.path:
        return _none()
    return data.load(
        config.eval.path, config.eval.lang or config.data.lang, missing=config.data.missing,
        fields=_fields(config.eval.path, config.eval.fields), needs=("answer",),
        limit=config.eval.limit, registry=registry, setting="eval.path",
    )  # fmt: skip


def _exemplars(config, registry) -> tuple[data.Row, ...]:
    count = config.prompt.exemplars
    if not count:
        return ()
    rows, _ = data.load(
        config.prompt.exemplars_path, (config.prompt.exemplars_lang,),
        fields=_fields(config.prompt.exemplars_path, config.data.fields),
        needs=("answer", "solution"), registry=registry, setting="prompt.exemplars_path",
    )  # fmt: skip
    if len(rows) < count:
        raise ValueError(
            f"prompt.exemplars is {count}: {config.prompt.exemplars_path} has {len(rows)} rows"
        )
    return tuple(rows[:count])


def _model(config) -> tuple[pathlib.Path, model.ModelConfig, prompts.Tokenizer]:
    """Where the model is, its shape, and its tokenizer."""
    path = hub.resolve(config.model.path, config.model.revision, weights=False)
    tok = tokenizer.load(
        hub.resolve(config.model.tokenizer, weights=False, setting="model.tokenizer")
        if config.model.tokenizer
        else path
    )
    if config.model.init == "random" and config.model.shape:
        if config.model.shape not in model.SHAPES:
            raise ValueError(
                f"model.shape is {config.model.shape!r}: the choices are {', '.join(model.SHAPES)}"
            )
        shape = model.SHAPES[config.model.shape]
        if config.model.shape == "tiny":
            # As wide as the tokenizer, in multiples that a mesh divides.
            shape = dataclasses.replace(shape, vocab_size=-(-len(tok) // 64) * 64)
        return path, shape, tok
    return path, hf.load_config(path), tok


def _fitting(rows, make, side: str, config, dropped) -> tuple[list[data.Row], int]:
    """Rows whose prompt fits, and the longest prompt's length; others are counted."""
    setting, limit = f"{side}.max_tokens", config[side].max_tokens
    lengths = []

    def measured(row: data.Row) -> prompts.Prompt:
        prompt = make(row)
        lengths.append(prompt.length)
        return prompt

    kept, gone = prompts.within(
        rows, measured, limit, setting=setting, overlong=config.data.overlong
    )
    if gone:
        dropped[f"prompt above {setting}={limit}"] += gone
    if rows and not kept:
        raise ValueError(
            f"{setting} is {limit}: no row's prompt fits, the shortest has {min(lengths)} tokens"
        )
    return kept, max((n for n in lengths if n <= limit), default=0)


def _check_lengths(config, model_config: model.ModelConfig, longest: dict[str, int]) -> None:
    """Prompt and completion within the positions that the model knows."""
    completion = config.rollout.max_tokens
    needed = [
        ("student", "rollout.max_tokens", completion),
        ("teacher", "rollout.max_tokens", completion),
        ("evaluation", "eval.max_tokens", config.eval.max_tokens or completion),
    ]
    if "analysis" in longest:
        # What the analysis can add, up to the setting that drops longer prompts.
        whole = longest["teacher"] + longest["analysis"] + config.context.max_tokens
        longest["teacher"] = min(config.teacher.max_tokens, whole)
        needed.append(("analysis", "context.max_tokens", config.context.max_tokens))
    for side, name, tokens in needed:
        if longest[side] + tokens > model_config.max_position:
            raise ValueError(
                f"{name} is {tokens}: with the longest {side} prompt of {longest[side]} tokens it "
                f"passes the model's {model_config.max_position} positions"
            )


def trained_shapes(config: config_lib.Config, shape: model.ModelConfig) -> Any:
    """Shapes of what is trained, without memory."""
    if config.train.trainable == "full":
        return model.abstract(shape, jnp.float32)
    c = config.lora
    return jax.eval_shape(lambda: lora.init(shape, c.rank, c.targets, jax.random.key(0)))


def fingerprint(plan: Plan) -> str:
    """SHA-256 of the weights' files by name, size and first and last MiB; '' for random weights."""
    if plan.config.model.init == "random":
        return ""
    path = plan.weights_path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
