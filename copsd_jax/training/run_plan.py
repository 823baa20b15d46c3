"""The plan of a run: settings, problems, shapes, tokenizer and prompts, checked without weights.

`make_plan` refuses a run that cannot work, and explains the refusal in one sentence. `make_plan`
takes seconds and writes nothing.
"""

import collections
import dataclasses
import functools
import pathlib
from typing import Any

from jax.sharding import Mesh

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.problems import languages, problem_row, sources
from copsd_jax.runtime import sharding
from copsd_jax.sampler import request
from copsd_jax.servers import client, remote_engine, sampler_server
from copsd_jax.teaching import (
    contexts,
    conversations,
    problem_selection,
    prompts,
    replies,
    teacher_prompts,
    teacher_side,
    text_encoding,
    token_selection,
)
from copsd_jax.training import backends, guards, model_headers, prompt_lengths, table_rules
from copsd_jax.weights import hf, hub, initial_weights, tokenizer


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """The part of a plan that determines a run's compiled programs.

    Attributes:
      config: the settings of the run.
      mesh: the devices of the run.
      dtype: the dtype of base weights and of computation.
      model_config: the shape of the model.
    """

    config: config_lib.Config
    mesh: Mesh
    dtype: Any
    model_config: transformer.ModelConfig

    @property
    def adapter_scale(self) -> float:
        """The factor alpha / rank by which the output of an adapter is multiplied."""
        return self.config.lora.alpha / self.config.lora.rank


@dataclasses.dataclass(frozen=True)
class Plan(ProgramPlan):
    """The checked plan of a run, without weights.

    Attributes:
      weights_path: the model's file or folder.
      start: the folder of the weights from which training starts; None if model.init_from is empty.
      tokenizer: the tokenizer named by model.tokenizer or, if this setting is empty, the model's
        own tokenizer.
      vocabulary: the ids that may be sampled, their bytes, and the ids that end a text.
      special_ids: the ids of added tokens.
      rows: the problems to train on.
      dropped: the number of training rows left out, by reason.
      eval_rows: the problems to evaluate on.
      eval_dropped: the number of evaluation rows left out, by reason.
      unread: the fields of the files that nothing reads, by the setting that maps fields.
      student, evaluation, author: the prompt format of each side.
      teacher: the object that builds the teacher's prompts.
      selection: the settings that select the tokens with loss.
      guards: the rules that watch the metrics.
      replies: with author.kind=file, the replies by row id and sample; otherwise {}.
      longest: for each side, the number of tokens in its longest prompt; for the teacher, an upper
        bound of this number.
      server: with sampler.engine=server, the connected server; otherwise None.
    """

    weights_path: pathlib.Path
    start: initial_weights.Source | None
    tokenizer: text_encoding.Tokenizer
    vocabulary: request.Vocabulary
    special_ids: tuple[int, ...]
    rows: list[problem_row.Row]
    dropped: collections.Counter
    eval_rows: list[problem_row.Row]
    eval_dropped: collections.Counter
    unread: dict[str, tuple[str, ...]]
    student: conversations.PromptFormat
    teacher: teacher_side.TeacherSide
    evaluation: conversations.PromptFormat
    author: conversations.PromptFormat
    selection: token_selection.Settings
    guards: tuple[guards.Rule, ...]
    replies: dict[tuple[str, int], str]
    longest: dict[str, int]
    server: remote_engine.EngineServer | None

    @property
    def context(self) -> contexts.Settings:
        """The settings of the teacher's privileged context."""
        return self.teacher.context


def make_plan(config: config_lib.Config, *, train: bool = True, evaluate: bool = True) -> Plan:
    """Checks a config against files, shapes and devices; reads no weights and writes nothing.

    Pretrained weights that are not on this machine are downloaded last, after all other checks.

    Args:
      config: the settings of a run.
      train: whether to load the problems to train on.
      evaluate: whether to load the problems to evaluate on.

    Raises:
      ValueError, OSError: the run cannot work; the message is one sentence that names the setting.
    """
    table_rules.check_choices(config, train=train)
    server = sampler_server.plan_sampler_server(config, train) if train or evaluate else None
    registry = languages.load_languages(config.languages_file)
    _check_languages(config, registry)
    context, selection = table_rules.context_settings(config), _build_selection_settings(config)
    rules = guards.parse_rules([rule for rule in config.guards.rules.split(",") if rule])
    guards.check_metrics(rules)
    # The cheap checks come first: files of problems, then devices, then the model's headers.
    written = _author_replies(config) if train else {}
    problems = held = sources.Loaded([], collections.Counter())
    if train:
        problems = problem_selection.load_train_rows(config, context, registry)
    if evaluate:
        held = problem_selection.load_eval_rows(config, registry)
    exemplars = problem_selection.load_exemplars(config, registry)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if train:
        setting_rules.check_shard_settings(config, sharding.batch_shards(mesh))
        backends.choose_loss(config, sharding.platform(mesh))
    start = initial_weights.find_source(config.model.init_from)
    path, shape, tok = model_headers.read_headers(config)
    turn_end = prompts.find_turn_end(tok) if config.prompt.template == "chat" else None
    vocabulary = request.Vocabulary(
        tokenizer.mark_valid_ids(tok, shape.vocab_size), tokenizer.list_token_bytes(tok),
        tokenizer.find_stop_ids(tok, path, shape.vocab_size, turn_end),
    )  # fmt: skip
    dtype = model_headers.choose_dtype(config.model.dtype, mesh)
    backends.check_attention(config, sharding.platform(mesh), dtype, shape)
    setting_rules.check_top_k_settings(config, shape.vocab_size)
    sharding.count_sharded_key_repeats(shape.n_heads, shape.n_kv_heads, mesh.shape["tensor"])
    sides = _plan_prompt_formats(config, registry, exemplars, tok)
    taught, side = config_lib.traits(config).teacher, sides.pop("teacher")
    # Only a method with a teacher has exemplars with replies.
    shown = teacher_prompts.build_exemplars(side, context) if taught else ()
    teacher = teacher_side.TeacherSide(tok, side, context, shown)
    trained, examined, longest = _keep_fitting(config, sides, teacher, problems.rows, held.rows)
    if train:
        problem_selection.check_language_shares(config, trained.rows, registry)
    server = server and _connect_planned_server(config, server, longest)
    room = shape.max_position
    prompt_lengths.check_room(config, longest, room, f"the model's {room} positions")
    longest["teacher"] = prompt_lengths.bound_teacher(config, context, shape, longest["teacher"])
    if config.model.init == "pretrained":
        # Weights are downloaded last, when everything else has been accepted.
        model = config.model
        path = hub.resolve_model_path(model.path, model.commit or model.revision)
        hf.check_weights(path, shape)
    initial_weights.check_source(start, config_lib.flat(config), shape, path)
    return Plan(
        config, mesh, dtype, shape, path, start, tok, vocabulary,
        special_ids=tuple(sorted(tok.get_added_vocab().values())),
        rows=trained.rows, dropped=problems.dropped + trained.dropped,
        eval_rows=examined.rows, eval_dropped=held.dropped + examined.dropped,
        unread={"data.fields": problems.unread, "eval.fields": held.unread},
        **sides, teacher=teacher, selection=selection, guards=rules, replies=written,
        longest=longest, server=server,
    )  # fmt: skip


def _keep_fitting(
    config: config_lib.Config, sides: dict[str, conversations.PromptFormat],
    teacher: teacher_side.TeacherSide, rows: list[problem_row.Row],
    eval_rows: list[problem_row.Row],
) -> tuple[prompt_lengths.FittingRows, prompt_lengths.FittingRows, dict[str, int]]:  # fmt: skip
    """Returns the training and evaluation rows that fit, and the lengths of the longest prompts."""
    trained = prompt_lengths.keep_fitting_training(rows, config, sides["student"], teacher)
    build = functools.partial(prompts.build_student_prompt, teacher.tokenizer, sides["evaluation"])
    examined = prompt_lengths.keep_fitting(eval_rows, build, "evaluation", "prompt", config)
    longest = {"teacher": 0, **trained.longest, **examined.longest}
    longest |= teacher.measure_author(config.author.kind, sides["author"], trained.rows)
    return trained, examined, longest


def _connect_planned_server(
    config: config_lib.Config, server: remote_engine.EngineServer, longest: dict[str, int]
) -> remote_engine.EngineServer:
    """Checks that the server answers and has room for the longest texts; returns the server."""
    server = remote_engine.connect_server(server)
    if room := server.max_model_len:
        training = ["student"] if config_lib.traits(config).samples else []
        drawn = [*training, "evaluation", "author"]
        place = f"the {room} tokens that {server.api.url} allows (sampler.max_model_len)"
        asked = {side: longest[side] for side in drawn if longest.get(side)}
        prompt_lengths.check_room(config, asked, room, place)
    return server


def _plan_prompt_formats(config, registry, exemplars, tok) -> dict[str, conversations.PromptFormat]:
    """Returns each side's prompt format, after checking the formats that the method uses."""
    sections = {"student": "prompt", "evaluation": "eval", "teacher": "teacher", "author": "author"}
    opening = {name: config[section].thinking for name, section in sections.items()}
    if opening["author"] == "as_teacher":
        opening["author"] = opening["teacher"]
    p = config.prompt
    shots = {name: () if name == "author" else exemplars for name in sections}
    sides = {
        name: conversations.PromptFormat(
            p.template, thinking, p.answer, registry, shots[name], p.form, p.date
        )
        for name, thinking in opening.items()
    }
    used = {"student": True, "evaluation": True, "teacher": config_lib.traits(config).teacher,
            "author": config.author.kind in ("student", "teacher")}  # fmt: skip
    for name, section in sections.items():
        if used[name]:
            prompts.check_thinking(tok, p.template, opening[name], f"{section}.thinking")
    return sides


def _build_selection_settings(config: config_lib.Config) -> token_selection.Settings:
    """Returns the settings of token selection; imports the user's function if one is named."""
    names = "select on_failure occurrence fuzzy"
    chosen = token_selection.Settings(**config_lib.pick(config.tokens, names))
    token_selection.import_span_function(chosen.select)  # raises an error if the import fails
    return chosen


def _author_replies(config: config_lib.Config) -> dict[tuple[str, int], str]:
    """Checks the author's server or file; returns the replies in the file, or {} without a file."""
    author = config.author
    if author.kind == "server":
        client.check_server(client.server_from_settings(author, "author", author.cache))
    return replies.load_reply_file(author.path) if author.kind == "file" else {}


def _check_languages(config: config_lib.Config, registry) -> None:
    """Checks that every language code in the settings is known."""
    named = {"data.lang": config.data.lang, "eval.lang": config.eval.lang}
    named["prompt.exemplars_lang"] = (config.prompt.exemplars_lang,)
    for setting, codes in named.items():
        for code in codes:
            try:
                languages.resolve_code(code, registry)
            except ValueError as error:
                raise ValueError(f"{setting} is {code!r}: {error}") from error
