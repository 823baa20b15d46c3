"""The authors of contexts: the student, the teacher, the grader's rule, a server, or a file.

An author's text is read strictly. Every completion gets a `replies.Reply` with a status. If the
status of a reply is unusable, the completion gets no context. The number of replies with each
status is a metric.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import processes
from copsd_jax.sampler import request
from copsd_jax.servers import chat, client
from copsd_jax.teaching import (
    contexts,
    conversations,
    prompts,
    replies,
    teacher_prompts,
    text_encoding,
)
from copsd_jax.training import loaded_run, run_plan, train_step


class AuthorRequest(NamedTuple):
    """One completion for which an author writes a context.

    Attributes:
      attempt: the completion, as the `Attempt` that contexts read.
      sample: the index of the completion among the completions of its problem.
      found: the final answer that the grader found in the attempt, or None.
    """

    attempt: contexts.Attempt
    sample: int
    found: str | None


class AuthorText(NamedTuple):
    """An author's text for one completion, or the reason for its absence.

    Attributes:
      text: the text; "" if there is none.
      status: "written", or a key of replies.STATUSES, such as "cut" (the text ended at the token
        limit).
      detail: one readable line with the reason for a failure. If the request was first refused and
        then answered, the line states the refusal. In all other cases, `detail` is "".
      shortened: the sections of the author's prompt that were cut to context.section_tokens.
      seen: the shortened attempt in the author's prompt; None if the attempt was not shortened.
    """

    text: str
    status: str
    detail: str = ""
    shortened: tuple[str, ...] = ()
    seen: str | None = None


def write_replies(
    r: loaded_run.LoadedRun, state: train_step.State, asked: Sequence[AuthorRequest], step: int
) -> list[replies.Reply]:
    """Returns a reply for each completion, in the order of the requests.

    If the context does not read the attempt, one text is written per problem and shared by the
    problem's completions. If the context reads no reply, every reply is `replies.NONE`.

    Args:
      r: the loaded run, with the settings author.* and context.*.
      state: the state with the weights of the authors `student` and `teacher`.
      asked: one request per completion.
      step: the training step; it selects the random stream from which authors sample.
    """  # fmt: skip
    reads = contexts.list_inputs(r.plan.context)
    if "reply" not in reads:
        return [replies.NONE] * len(asked)
    each = "attempt" in reads
    key = lambda one: (one.attempt.row.id, one.sample if each else 0)  # noqa: E731
    distinct = {key(one): one if each else one._replace(sample=0) for one in asked}
    texts = AUTHORS[r.plan.config.author.kind](r, state, list(distinct.values()), step)
    read = [
        _read_author_text(r, one, text) for one, text in zip(distinct.values(), texts, strict=True)
    ]
    made = dict(zip(distinct, read, strict=True))
    return [made[key(one)] for one in asked]


# --- authors ------------------------------------------------------------------------------------


def _sample_author_texts(r, state, asked: list[AuthorRequest], step: int) -> list[AuthorText]:
    """Samples the texts with the run's sampler, under the settings author.*.

    The student writes with its current weights, and the teacher writes with the teacher's weights.
    With teacher.weights=fixed, the teacher is the initial policy at every step.
    """
    plan, c = r.plan, r.plan.config
    writer = 0 if c.author.kind == "student" else 1
    policy = loaded_run.derive_run_policies(r, state)[writer]
    made = [
        teacher_prompts.build_author_prompt(plan.tokenizer, plan.author, plan.context, one.attempt)
        for one in asked
    ]
    out = [_explain_unasked_author(prompt, plan) for prompt in made]
    todo = [i for i, written in enumerate(out) if written is None]
    wanted = [prompt for prompt in (made[i] for i in todo) if prompt is not None]
    ids, samples = [asked[i].attempt.row.id for i in todo], [asked[i].sample for i in todo]
    keys = request.derive_sampling_keys(c.seed, "author", step, ids, samples)
    done = loaded_run.sample(r, policy, wanted, "author", keys).completions if todo else []
    for i, prompt, completion in zip(todo, wanted, done, strict=True):
        text = prompts.restore_think_tag(prompt, loaded_run.decode_completion(r, completion.ids))
        status = {"length": "cut", "stop": "written"}.get(completion.finish, completion.finish)
        seen = _shorten_attempt_for_author(plan, asked[i].attempt, prompt.shortened)
        out[i] = AuthorText(text, status, completion.detail, prompt.shortened, seen)
    return [written for written in out if written is not None]


def _explain_unasked_author(prompt, plan: run_plan.Plan) -> AuthorText | None:
    """Returns an empty text if the author is not asked, and None if the author is asked.

    The status of the empty text says why the author is not asked.
    """
    if prompt is None:
        return AuthorText("", "not_asked")
    held = plan.model_config.max_position
    if plan.server is not None and plan.server.max_model_len:
        held = min(held, plan.server.max_model_len)
    room = held - plan.config.author.max_tokens
    return AuthorText("", "overlong") if prompt.length > room else None


def _shorten_attempt_for_author(
    plan: run_plan.Plan, attempt: contexts.Attempt, shortened: Sequence[str]
) -> str | None:
    """Returns the shortened attempt of an author's prompt; None if the attempt is not shortened."""
    if "attempt" not in shortened:
        return None
    return text_encoding.truncate_text(plan.tokenizer, attempt.text, plan.context.section_tokens)


def _write_author_texts_by_rule(
    r, state, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    """Writes each text by the context's rule, which reads the grader's verdict."""
    write_by_rule = contexts.get_author(r.plan.context).write_by_rule
    assert write_by_rule is not None  # `table_rules` refuses contexts without a rule
    return [AuthorText(write_by_rule(one.attempt, one.found), "written") for one in asked]


def _request_author_texts(r, state, asked: list[AuthorRequest], step: int) -> list[AuthorText]:
    """Asks an OpenAI-compatible server for the texts.

    The seed of a request is the run's seed plus the sample's index, so a cache can answer repeated
    requests.
    """
    plan, c = r.plan, r.plan.config
    fitted = [
        teacher_prompts.build_author_conversation(plan.tokenizer, plan.context, one.attempt)
        for one in asked
    ]
    requests = [
        chat.ChatRequest(
            messages=conversations.render_messages(plan.author, one.attempt.row, conversation),
            **config_lib.pick(c.author, "temperature top_p max_tokens"),
            seed=c.seed + one.sample,
        )
        for one, (conversation, _) in zip(asked, fitted, strict=True)
        if conversation
    ]
    server = client.server_from_settings(c.author, "author", c.author.cache)
    answers = iter(processes.run_on_leader(lambda: chat.ask_all(server, requests)))
    out = []
    for one, (conversation, shortened) in zip(asked, fitted, strict=True):
        if not conversation:
            out.append(AuthorText("", "not_asked"))
            continue
        answer = next(answers)
        status = "written" if answer.status == "ok" else answer.status
        seen = _shorten_attempt_for_author(plan, one.attempt, shortened)
        out.append(AuthorText(answer.text, status, answer.detail, shortened, seen))
    return out


def _look_up_author_texts(r, state, asked: list[AuthorRequest], step: int) -> list[AuthorText]:
    """Returns the texts from the file author.path."""
    texts = [r.plan.replies.get((one.attempt.row.id, one.sample)) for one in asked]
    return [AuthorText(text or "", "missing" if text is None else "written") for text in texts]


AUTHORS: dict[str, Callable[..., list[AuthorText]]] = {
    "student": _sample_author_texts,
    "teacher": _sample_author_texts,
    "grader": _write_author_texts_by_rule,
    "server": _request_author_texts,
    "file": _look_up_author_texts,
}


# --- reading ------------------------------------------------------------------------------------


def _read_author_text(
    r: loaded_run.LoadedRun, asked: AuthorRequest, written: AuthorText
) -> replies.Reply:
    """Reads the reply in an author's text, and applies the policy for leaked answers."""
    c, attempt, settings = r.plan.config, asked.attempt, r.plan.context
    if written.seen is not None:
        # A critique can repeat only the steps that its author was shown.
        attempt = dataclasses.replace(attempt, text=written.seen)
    # As in the published methods, some contexts read replies that were cut at author.max_tokens.
    # For other contexts, a cut reply is unusable even if its tags are complete, because the missing
    # part may contradict the content of the tags.
    reads_cut = contexts.get_author(settings).reads_cut(settings) and bool(written.text)
    if written.status == "written" or (written.status == "cut" and reads_cut):
        reply = contexts.read_reply(settings, attempt, written.text)
        reply = replies.apply_leak_policy(reply, attempt.row, c.context.leak)
    else:
        reply = replies.Reply(written.status, raw=written.text)
    # If the reply is usable, an earlier refusal of its request is not a failure.
    detail = "" if replies.STATUSES[reply.status].usable else written.detail
    return dataclasses.replace(
        reply, cut=written.status == "cut", detail=detail, shortened=written.shortened
    )
