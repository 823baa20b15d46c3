"""What will run: settings, problems, shapes, tokenizer and prompts, checked without any weight.

`make_plan` refuses what cannot work, in seconds and in one sentence, and writes nothing.
"""

import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.model import lora, transformer
from copsd_jax.problems import languages, problem_row
from copsd_jax.runtime import sharding, workdir
from copsd_jax.sampler import request
from copsd_jax.servers import client, dialects, remote_engine
from copsd_jax.teaching import (
    contexts,
    conversations,
    problem_selection,
    prompts,
    replies,
    teacher_prompts,
    text_encoding,
    token_selection,
)
from copsd_jax.training import backends, guards, table_rules
from copsd_jax.weights import hf, hf_config, hub, tokenizer


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What a run's programs are made from, no problem, prompt or weight; a Plan has it all too."""

    config: config_lib.Config
    mesh: Mesh
    dtype: Any  # of base weights and compute
    model_config: transformer.ModelConfig
    adapter_scale: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that can be carried out, without its weights."""

    config: config_lib.Config
    mesh: Mesh
    dtype: Any  # of base weights and compute
    weights_path: pathlib.Path
    model_config: transformer.ModelConfig
    tokenizer: text_encoding.Tokenizer
    vocabulary: request.Vocabulary
    rows: list[problem_row.Row]
    eval_rows: list[problem_row.Row]
    dropped: collections.Counter  # of training rows, by reason
    eval_dropped: collections.Counter
    student: conversations.PromptFormat
    teacher: conversations.PromptFormat
    evaluation: conversations.PromptFormat
    writer: conversations.PromptFormat  # of what an author is asked
    context: contexts.Settings
    shots: tuple[teacher_prompts.Exemplar, ...]  # the teacher's exemplars
    selection: token_selection.Settings
    guards: tuple[guards.Rule, ...]
    records: dict[tuple[str, int], str]  # author.kind=file: replies by row id and sample
    special_ids: tuple[int, ...]
    adapter_scale: float
    longest: dict[str, int]  # tokens of the longest prompt of each side
    server: remote_engine.EngineServer | None  # of sampler.engine=server, which answered


def make_plan(config: config_lib.Config, *, train: bool = True, evaluate: bool = True) -> Plan:
    """Checks a config against files, shapes and devices; reads no weights, writes nothing.

    Args:
      train: with the problems to train on; without, the plan has none.
      evaluate: with the problems to evaluate on.

    Raises:
      ValueError, OSError: in one sentence.
    """
    table_rules.check(config, train=train)
    server = _server(config, train) if train or evaluate else None
    registry = languages.load_languages(config.languages_file)
    _check_languages(config, registry)
    context, chosen = table_rules.context_settings(config), _selection(config)
    rules = _guards(config)
    # The cheap checks first: files of problems, then devices, then the model's headers.
    records = _author(config) if train else {}
    rows, dropped = (
        problem_selection.load_train_rows(config, context, registry) if train else _no_rows()
    )
    eval_rows, eval_dropped = (
        problem_selection.load_eval_rows(config, registry) if evaluate else _no_rows()
    )
    exemplars = problem_selection.load_exemplars(config, registry)
    devices = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if train:
        setting_rules.check_shards(config, sharding.batch_shards(devices))
        backends.choose_loss(config, sharding.platform(devices))
    path, model_config, tok = _model(config)
    kind = choose_dtype(config.model.dtype, devices)
    backends.check_attention(config, sharding.platform(devices), kind, model_config)
    setting_rules.check_vocabulary(config, model_config.vocab_size)
    sharding.key_repeats(model_config.n_heads, model_config.n_kv_heads, devices.shape["tensor"])
    sides = _sides(config, registry, exemplars, tok)
    has_teacher = config_lib.traits(config).teacher
    shots = teacher_prompts.build_exemplars(sides["teacher"], context) if has_teacher else ()
    examine = functools.partial(prompts.build_student_prompt, tok, sides["evaluation"])
    longest = {"teacher": 0}
    rows = _train_rows_that_fit(config, tok, sides, context, shots, rows, dropped, longest)
    found = _fitting(eval_rows, examine, "prompt", config, eval_dropped)
    eval_rows, longest["evaluation"] = found
    if train:
        problem_selection.check_language_shares(config, rows, registry)
    if config.author.kind in ("student", "teacher"):
        asks = (
            teacher_prompts.build_author_prompt(tok, sides["writer"], context, _probed(r))
            for r in rows
        )
        longest["writer"] = max((ask.length for ask in asks if ask), default=0)
    server = _connected(config, server, longest)
    _check_lengths(config, context, model_config, longest)
    if config.model.init == "pretrained":
        # Last: of a repository, everything else is refused before its weights are downloaded.
        path = hub.resolve(config.model.path, config.model.revision)
        hf.check_weights(path, model_config)
    return Plan(
        config=config,
        mesh=devices,
        dtype=kind,
        weights_path=path,
        model_config=model_config,
        tokenizer=tok,
        vocabulary=_build_vocabulary(tok, path, model_config.vocab_size),
        special_ids=tuple(sorted(tok.get_added_vocab().values())),
        rows=rows,
        eval_rows=eval_rows,
        dropped=dropped,
        eval_dropped=eval_dropped,
        **sides,
        context=context,
        shots=shots,
        selection=chosen,
        guards=rules,
        records=records,
        adapter_scale=adapter_scale(config),
        longest=longest,
        server=server,
    )


def _no_rows() -> tuple[list[problem_row.Row], collections.Counter[str]]:
    return [], collections.Counter()


def _build_vocabulary(
    tok: text_encoding.Tokenizer, path: pathlib.Path, size: int
) -> request.Vocabulary:
    return request.Vocabulary(
        valid_V=tokenizer.mark_valid_ids(tok, size),
        token_bytes=tokenizer.list_token_bytes(tok),
        stop_ids=tokenizer.find_stop_ids(tok, path),
    )


def adapter_scale(config: config_lib.Config) -> float:
    return config.lora.alpha / config.lora.rank


def choose_dtype(name: str, devices: Mesh) -> Any:
    """Of base weights and compute, by `model.dtype` and the mesh's platform."""
    auto = jnp.float32 if sharding.platform(devices) == "cpu" else jnp.bfloat16
    return {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def _sides(config, registry, exemplars, tok) -> dict[str, conversations.PromptFormat]:
    """How each side's prompts look; of those that the method uses, the template can do it."""
    opening = {
        "student": config.prompt.thinking,
        "teacher": config.teacher.thinking,
        "evaluation": config.eval.thinking,
        "writer": config.author.thinking,
    }
    if opening["writer"] == "as_teacher":
        opening["writer"] = opening["teacher"]
    p = config.prompt
    sides = {
        name: conversations.PromptFormat(
            p.template, thinking, p.answer, registry, () if name == "writer" else exemplars, p.form
        )
        for name, thinking in opening.items()
    }  # fmt: skip
    settings = {"student": "prompt", "evaluation": "eval"}
    if config_lib.traits(config).teacher:
        settings["teacher"] = "teacher"
    if config.author.kind in ("student", "teacher"):
        settings["writer"] = "author"
    for name, section in settings.items():
        prompts.check_thinking(tok, p.template, sides[name].thinking, f"{section}.thinking")
    return sides


def _guards(config: config_lib.Config) -> tuple[guards.Rule, ...]:
    return guards.check_metrics(
        guards.parse_rules([rule for rule in config.guards.rules.split(",") if rule])
    )


def _selection(config: config_lib.Config) -> token_selection.Settings:
    names = ("select", "on_failure", "occurrence", "fuzzy")
    chosen = token_selection.Settings(**{name: config.tokens[name] for name in names})
    token_selection.import_span_function(chosen.select)  # refuses one that cannot be imported
    return chosen


def _author(config: config_lib.Config) -> dict[tuple[str, int], str]:
    """Refuses a server or a file that cannot answer; the file's replies."""
    if config.author.kind == "server":
        author = config.author
        client.check_server(client.server_from_settings(author, author.cache), "author.")
    return replies.load_reply_file(config.author.path) if config.author.kind == "file" else {}


def _server(config: config_lib.Config, train: bool) -> remote_engine.EngineServer | None:
    """The server of sampler.*, of settings that go with one; nothing is asked."""
    s = config.sampler
    if s.engine != "server":
        return None
    server = remote_engine.EngineServer(
        client.server_from_settings(s), s.dialect, s.logprobs, s.max_model_len or None
    )
    remote_engine.check_server(server)
    if (count := jax.process_count()) > 1:
        raise ValueError(f"sampler.engine is 'server': one process asks it, and there are {count}")
    if s.folder:
        workdir.check_writable(pathlib.Path(s.folder), "--config.sampler.folder")
    coldest = dialects.DIALECTS[s.dialect].coldest
    for section in ("rollout", "eval", "author"):
        if 0 < (degree := config[section].temperature) < coldest:
            rule = f"with sampler.dialect={s.dialect} it is 0 or at least {coldest}"
            raise ValueError(f"{section}.temperature is {degree}: {rule}")
    if train:
        _check_reported(config)
    return server


def _check_reported(config: config_lib.Config) -> None:
    """Losses that read the sampler's log-probabilities need a server that gives them."""
    c, r = config, config.rollout
    drawn = request.Sampling(r.max_tokens, r.temperature, r.top_k, r.top_p, r.min_p)
    given = remote_engine.reports_log_probs(c.sampler.logprobs, drawn)[0]
    for section, key, off in (
        ("policy", "old", "trainer"), ("policy", "rollout_clip", 0), ("loss", "rollout_clip", 0),
    ):  # fmt: skip
        if not given and c[section][key] != off:
            raise ValueError(
                f"{section}.{key} is {c[section][key]!r}: it reads log-probabilities over all "
                f"tokens at rollout.temperature={r.temperature}, which do not follow from "
                f"sampler.logprobs={c.sampler.logprobs} with these rollout.*"
            )


def _connected(
    config, server: remote_engine.EngineServer | None, longest
) -> remote_engine.EngineServer | None:
    """The server once it answered, with room for each side's longest prompt and completion."""
    if server is None:
        return None
    server = remote_engine.connect(server)
    completion, room = config.rollout.max_tokens, server.max_model_len
    for side, name, tokens in (
        ("student", "rollout.max_tokens", completion if config_lib.traits(config).samples else 0),
        ("evaluation", "eval.max_tokens", config.eval.max_tokens or completion),
        ("writer", "author.max_tokens", config.author.max_tokens),
    ):
        if room and tokens and longest.get(side) and longest[side] + tokens > room:
            raise ValueError(
                f"{name} is {tokens}: with the longest {side} prompt of {longest[side]} tokens it "
                f"passes the {room} that {server.api.url} holds (sampler.max_model_len)"
            )
    return server


def _probed(row: problem_row.Row) -> contexts.Attempt:
    """An attempt in which everything is there, as short as can be."""
    return contexts.Attempt(row, "-", False, "-", "-", row)


def _probe(
    tok, spec: conversations.PromptFormat, context, shots, row: problem_row.Row
) -> prompts.Prompt:
    prompt = teacher_prompts.build_teacher_prompt(
        tok, spec, context, _probed(row), replies.PROBE, shots
    )
    assert prompt is not None  # a probe has all that a context reads
    return prompt


def build_probe_prompt(plan: Plan, row: problem_row.Row) -> prompts.Prompt:
    """The teacher's prompt with the shortest attempt and reply: its exemplars, its state and its
    least length."""
    return _probe(plan.tokenizer, plan.teacher, plan.context, plan.shots, row)


def build_teacher_prompt(
    plan: Plan, attempt: contexts.Attempt, reply: replies.Reply = replies.NONE
) -> prompts.Prompt | None:
    """`teacher_prompts.build_teacher_prompt` with the plan's settings and exemplars."""
    return teacher_prompts.build_teacher_prompt(
        plan.tokenizer, plan.teacher, plan.context, attempt, reply, plan.shots
    )


def drop_overlong(
    plan: Plan, asked: Sequence[prompts.Prompt], told: Sequence[prompts.Prompt | None]
) -> tuple[list[prompts.Prompt | None], int]:
    """A step's teacher prompts with None for those that are too long, and how many these are.

    Raises:
      ValueError: with data.overlong=error, or if both sides start in different template states.
    """
    c, kept, overlong = plan.config, [], 0
    limit = teacher_limit(c, plan.model_config)
    for student, teacher in zip(asked, told, strict=True):
        if teacher is not None:
            prompts.check_template_states(student, teacher, c.parity.template_mismatch)
        if teacher is not None and teacher.length > limit:
            if c.data.overlong == "error":
                raise ValueError(
                    f"teacher.max_tokens is {c.teacher.max_tokens}: a teacher prompt with its "
                    f"context has {teacher.length} tokens, and there is room for {limit}"
                )
            teacher, overlong = None, overlong + 1
        kept.append(teacher)
    return kept, overlong


def load_config(directory: pathlib.Path) -> config_lib.Config:
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
    config.mesh.update(config_lib.default().mesh)
    config.model.attention = config.sampler.attention = "auto"
    return config


def _check_languages(config: config_lib.Config, registry) -> None:
    named = {
        "data.lang": config.data.lang,
        "eval.lang": config.eval.lang,
        "prompt.exemplars_lang": (config.prompt.exemplars_lang,),
    }
    for setting, codes in named.items():
        for code in codes:
            try:
                languages.resolve_code(code, registry)
            except ValueError as error:
                raise ValueError(f"{setting} is {code!r}: {error}") from error


def _model(config) -> tuple[pathlib.Path, transformer.ModelConfig, text_encoding.Tokenizer]:
    """Where the model is, its shape, and its tokenizer."""
    path = hub.resolve(config.model.path, config.model.revision, weights=False)
    tok = tokenizer.load(
        hub.resolve(config.model.tokenizer, weights=False, setting="model.tokenizer")
        if config.model.tokenizer
        else path
    )
    if config.model.init == "random" and config.model.shape:
        shape = transformer.SHAPES[config.model.shape]
        if config.model.shape == "tiny":
            # As wide as the tokenizer, in multiples that a mesh divides.
            shape = dataclasses.replace(shape, vocab_size=-(-len(tok) // 64) * 64)
        return path, shape, tok
    return path, hf_config.load_config(path), tok


def _fitting(rows, make, side: str, config, dropped) -> tuple[list[problem_row.Row], int]:
    """Rows whose prompt fits, and the longest prompt's length; others are counted."""
    setting, limit = f"{side}.max_tokens", config[side].max_tokens
    lengths = []

    def measured(row: problem_row.Row) -> prompts.Prompt:
        prompt = make(row)
        lengths.append(prompt.length)
        return prompt

    kept, gone = prompts.keep_fitting_rows(
        rows, measured, limit, setting=setting, overlong=config.data.overlong
    )
    if gone:
        dropped[f"prompt above {setting}={limit}"] += gone
    if rows and not kept:
        raise ValueError(
            f"{setting} is {limit}: no row's prompt fits, the shortest has {min(lengths)} tokens"
        )
    return kept, max((n for n in lengths if n <= limit), default=0)


def _train_rows_that_fit(config, tok, sides, context, shots, rows, dropped, longest) -> list:
    """Training rows all of whose prompts fit; others are counted, lengths noted in `longest`."""
    ask = functools.partial(prompts.build_student_prompt, tok, sides["student"])
    tell = functools.partial(_probe, tok, sides["teacher"], context, shots)
    rows, longest["student"] = _fitting(rows, ask, "prompt", config, dropped)
    if not config_lib.traits(config).samples:
        return _with_short_targets(rows, tok, sides["student"], ask, config, dropped)
    if config_lib.traits(config).teacher:
        rows, longest["teacher"] = _fitting(rows, tell, "teacher", config, dropped)
        for row in rows[:1]:
            prompts.check_template_states(ask(row), tell(row), config.parity.template_mismatch)
    return rows


def _with_short_targets(
    rows, tok, spec: conversations.PromptFormat, ask, config, dropped
) -> list[problem_row.Row]:
    """Rows whose target of SFT fits; others are counted, or refused."""
    limit, kept = config.rollout.max_tokens, []
    for row in rows:
        length = len(prompts.encode_target(tok, spec, row, config.rollout.stop, ask(row).state))
        if length > limit and config.data.overlong == "error":
            raise ValueError(
                f"row {row.id!r} has a solution of {length} tokens, rollout.max_tokens is {limit}; "
                "data.overlong=drop leaves such rows out"
            )
        kept += [row] if length <= limit else []
    if rows and not kept:
        raise ValueError(f"rollout.max_tokens is {limit}: no row's solution fits")
    if len(kept) < len(rows):
        dropped[f"solution above rollout.max_tokens={limit}"] += len(rows) - len(kept)
    return kept


def _check_lengths(config, context, model_config: transformer.ModelConfig, longest) -> None:
    """Prompt and completion within the positions that the model knows."""
    completion = config.rollout.max_tokens
    needed = [
        ("student", "rollout.max_tokens", completion),
        ("teacher", "rollout.max_tokens", completion),
        ("evaluation", "eval.max_tokens", config.eval.max_tokens or completion),
    ]
    if "writer" in longest and config.author.kind in ("student", "teacher"):
        needed.append(("writer", "author.max_tokens", config.author.max_tokens))
    for side, name, tokens in needed:
        if longest[side] + tokens > model_config.max_position:
            raise ValueError(
                f"{name} is {tokens}: with the longest {side} prompt of {longest[side]} tokens it "
                f"passes the model's {model_config.max_position} positions"
            )
    # The step's finds and replies make it longer, up to the limit above which it is left out.
    reads = contexts.list_inputs(context)
    longest["teacher"] += config.author.max_tokens if "reply" in reads else 0
    longest["teacher"] += completion if "siblings" in reads else 0
    longest["teacher"] = min(longest["teacher"], teacher_limit(config, model_config))


def teacher_limit(config: config_lib.Config, model_config: transformer.ModelConfig) -> int:
    """The longest teacher prompt of a step, with all that it was given."""
    return min(config.teacher.max_tokens, model_config.max_position - config.rollout.max_tokens)


def trained_shapes(config: config_lib.Config, shape: transformer.ModelConfig) -> Any:
    """Shapes of what is trained, without memory."""
    if config.train.trainable == "full":
        return transformer.abstract_params(shape, jnp.float32)
    c = config.lora
    return jax.eval_shape(lambda: lora.init_adapter(shape, c.rank, c.targets, jax.random.key(0)))


def fingerprint_weights(plan: Plan) -> str:
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
