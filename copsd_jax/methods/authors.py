"""Who writes a context that needs writing: the student, the teacher, a rule, a server, or a file.

The writer's text is read strictly, and every completion gets a `replies.Reply` with a status. A
status that is not usable leaves the completion without a context; how many there are of each is a
metric.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from copsd_jax.model import policy as policy_lib
from copsd_jax.problems import problem_row
from copsd_jax.runtime import processes
from copsd_jax.sampler import request
from copsd_jax.servers import client
from copsd_jax.teaching import (
    answer_leaks,
    contexts,
    conversations,
    prompts,
    replies,
    teacher_prompts,
    text_encoding,
)
from copsd_jax.training import loaded_run, run_plan, train_step


class AuthorRequest(NamedTuple):
    """What a writer is asked about one completion."""

    attempt: contexts.Attempt
    sample: int
    found: str | None  # the final answer that the grader found in the attempt


class AuthorText(NamedTuple):
    """A writer's text, or why there is none.

    Attributes:
      status: "written"; "cut", which has a text too; or another of replies.STATUSES.
      detail: of a failure, a line for people.
      shortened: the sections of the writer's prompt that were cut to context.section_tokens.
      seen: the attempt as that prompt showed it; None where it was whole, or nobody was shown it.
    """

    text: str
    status: str
    detail: str = ""
    shortened: tuple[str, ...] = ()
    seen: str | None = None


def write_replies(
    r: loaded_run.LoadedRun, state: train_step.State, asked: Sequence[AuthorRequest], step: int
) -> list[replies.Reply]:
    """A reply for each completion, in their order.

    A context that does not read the attempt is written once a problem.
    """  # fmt: skip
    reads = contexts.list_inputs(r.plan.context)
    if "reply" not in reads:
        return [replies.NONE] * len(asked)
    each = "attempt" in reads
    key = lambda one: (one.attempt.row.id, one.sample if each else 0)  # noqa: E731
    distinct = {key(one): one if each else one._replace(sample=0) for one in asked}
    texts = AUTHORS[r.plan.config.author.kind](r, state, list(distinct.values()), step)
    made = {
        name: _read(r, one, written)
        for (name, one), written in zip(distinct.items(), texts, strict=True)
    }
    return [made[key(one)] for one in asked]


# ------------------------------------------------------------------------------------- writers


def _sampled(
    r: loaded_run.LoadedRun, policy: policy_lib.Policy, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    """The sampler again, with author.* settings."""
    plan, c = r.plan, r.plan.config
    made = [
        teacher_prompts.build_author_prompt(plan.tokenizer, plan.author, plan.context, one.attempt)
        for one in asked
    ]
    out = [_unasked(prompt, plan) for prompt in made]
    todo = [i for i, written in enumerate(out) if written is None]
    wanted = [prompt for prompt in (made[i] for i in todo) if prompt is not None]
    keys = request.derive_keys(
        c.seed, "author", step, [asked[i].attempt.row.id for i in todo],
        [asked[i].sample for i in todo],
    )  # fmt: skip
    done = loaded_run.sample(r, policy, wanted, "author", keys).completions if todo else []
    for i, prompt, completion in zip(todo, wanted, done, strict=True):
        text = loaded_run.restore_think_tag(prompt, loaded_run.decode_completion(r, completion.ids))
        status = "cut" if completion.finish == "length" else "written"
        seen = _seen(plan, asked[i].attempt, prompt.shortened)
        out[i] = AuthorText(text, status, shortened=prompt.shortened, seen=seen)
    return [written for written in out if written is not None]


def _unasked(prompt: prompts.Prompt | None, plan: run_plan.Plan) -> AuthorText | None:
    """Why a writer is not asked; None if it is."""
    if prompt is None:
        return AuthorText("", "not_asked")
    held = plan.model_config.max_position
    if plan.server is not None and plan.server.max_model_len:
        held = min(held, plan.server.max_model_len)
    room = held - plan.config.author.max_tokens
    return AuthorText("", "overlong") if prompt.length > room else None


def _seen(plan: run_plan.Plan, attempt: contexts.Attempt, shortened: Sequence[str]) -> str | None:
    """The attempt as a writer's prompt shows it, where it is shortened there."""
    if "attempt" not in shortened:
        return None
    return text_encoding.truncate_text(plan.tokenizer, attempt.text, plan.context.section_tokens)


def _student(
    r: loaded_run.LoadedRun, state: train_step.State, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    return _sampled(r, loaded_run.derive_policies(r, state)[0], asked, step)


def _teacher(
    r: loaded_run.LoadedRun, state: train_step.State, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    """The teacher's own weights: of `fixed` the initial policy, whatever the student has become."""
    return _sampled(r, loaded_run.derive_policies(r, state)[1], asked, step)


def _grader(
    r: loaded_run.LoadedRun, state: train_step.State, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    del state, step
    write_by_rule = contexts.get_author(r.plan.context).write_by_rule
    assert write_by_rule is not None  # author.kind=grader goes with such contexts alone
    return [AuthorText(write_by_rule(one.attempt, one.found), "written") for one in asked]


def _server(
    r: loaded_run.LoadedRun, state: train_step.State, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    """An OpenAI-compatible server; seeds follow from the run's, so that a cache can serve them."""
    del state, step
    plan, c = r.plan, r.plan.config
    build = contexts.get_author(plan.context).build_conversation
    unfitted = [build(plan.context, one.attempt) for one in asked]
    fitted = [
        ((), ())
        if conversation is None
        else teacher_prompts.truncate_sections(plan.tokenizer, plan.context, conversation)
        for conversation in unfitted
    ]
    requests = [
        client.ChatRequest(
            messages=conversations.render_messages(plan.author, one.attempt.row, conversation),
            temperature=c.author.temperature,
            top_p=c.author.top_p,
            max_tokens=c.author.max_tokens,
            seed=c.seed + one.sample,
        )
        for one, (conversation, _) in zip(asked, fitted, strict=True)
        if conversation
    ]
    answers = iter(processes.run_on_leader(lambda: client.ask_all(build_server(c), requests)))
    out = []
    for one, (conversation, shortened) in zip(asked, fitted, strict=True):
        if not conversation:
            out.append(AuthorText("", "not_asked"))
            continue
        answer = next(answers)
        status = "written" if answer.status == "ok" else answer.status
        seen = _seen(plan, one.attempt, shortened)
        out.append(AuthorText(answer.text, status, answer.detail, shortened, seen))
    return out


def build_server(c) -> client.Server:
    """The server of the settings author.*."""
    return client.server_from_settings(c.author, c.author.cache)


def _file(
    r: loaded_run.LoadedRun, state: train_step.State, asked: list[AuthorRequest], step: int
) -> list[AuthorText]:
    del state, step
    return [
        AuthorText(r.plan.replies[key], "written")
        if key in r.plan.replies
        else AuthorText("", "missing")
        for key in ((one.attempt.row.id, one.sample) for one in asked)
    ]


AUTHORS: dict[str, Callable[..., list[AuthorText]]] = {
    "student": _student,
    "teacher": _teacher,
    "grader": _grader,
    "server": _server,
    "file": _file,
}


# ------------------------------------------------------------------------------------- reading


def _read(r: loaded_run.LoadedRun, asked: AuthorRequest, written: AuthorText) -> replies.Reply:
    """The reply that a text holds, under the policy for leaked answers."""
    c, attempt, settings = r.plan.config, asked.attempt, r.plan.context
    if written.seen is not None:
        # A critic can repeat only the steps that it was shown.
        attempt = dataclasses.replace(attempt, text=written.seen)
    # As published, some replies that ended at author.max_tokens are read. Any other is unusable,
    # even if its tags are complete: it might have gone on to withdraw what it said.
    reads_cut = contexts.get_author(settings).reads_cut(settings) and bool(written.text)
    if written.status == "written" or (written.status == "cut" and reads_cut):
        reply = contexts.read_reply(settings, attempt, written.text)
        reply = apply_leak_policy(reply, attempt.row, c.context.leak)
    else:
        reply = replies.Reply(written.status, raw=written.text)
    return dataclasses.replace(
        reply, cut=written.status == "cut", detail=written.detail, shortened=written.shortened
    )


def apply_leak_policy(reply: replies.Reply, row: problem_row.Row, policy: str) -> replies.Reply:
    """context.leak, for an explanation that gives the final answer away."""
    if not reply.text or not row.answer or not answer_leaks.has_leak(reply.text, row.answer):
        return reply
    if policy == "drop":
        return replies.Reply("leak_dropped", quote=reply.quote, raw=reply.raw)
    text = answer_leaks.mask_leak(reply.text, row.answer) if policy == "mask" else reply.text
    return dataclasses.replace(reply, text=text, leaked=True)
