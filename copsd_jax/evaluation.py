"""Evaluation of a policy: completions of problems are sampled, graded and scored.

For each language and each group of problems, the scores are avg@n, pass@n, maj@n, format rate,
length and truncated share. Prompts, grader and stop conditions are the same as in training.
"""

import collections
import contextlib
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from copsd_jax.config import settings as config_lib
from copsd_jax.methods import failed_steps
from copsd_jax.metrics import eval_tables, scoring, terminal
from copsd_jax.model import policy as policy_lib
from copsd_jax.problems import problem_row
from copsd_jax.rewards import graders, reward_functions
from copsd_jax.runtime import (
    evaluation_files,
    failures,
    fingerprints,
    nonfinite,
    processes,
    storage,
    streams,
    workdir,
)
from copsd_jax.sampler import loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.teaching import prompts
from copsd_jax.training import loaded_run, train_step


def evaluate(
    r: loaded_run.LoadedRun,
    policy: policy_lib.Policy,
    rows: Sequence[problem_row.Row],
    progress: Callable[[loop.Stats], None] | None = None,
    partial: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Samples eval.samples completions per problem; grades and scores the completions.

    Random streams depend only on the seed, the problem and the sample. Two policies are therefore
    compared with the same random numbers.

    Args:
      r: the loaded run, with an open grader.
      policy: the weights to sample with.
      rows: the problems, with gold answers.
      progress: function that receives the sampler's statistics; completions that were read from
        `partial` count as done.
      partial: a file to which each completion is written as soon as it ends; see
        `_sample_evaluation`. A stopped evaluation is continued from the file `partial`. The caller
        removes the file after saving the result.

    Returns:
      `{"scores": {name: {...}}, "problems": [...]}`. A name is a language, or `language/group` if
      the language has several groups. Each entry of "problems" lists the samples of one problem.

    Raises:
      failures.UnusableFile: another evaluation wrote `partial`, or the file is damaged.
      failures.EngineError: the server failed, or more than half of the samples were lost.
      failures.RefusedRun: more than half of the samples were lost, mostly because the reward
        function failed.
      NonFinite: more than half of the samples were lost, mostly because logits were not finite.
    """
    plan, n = r.plan, r.plan.config.eval.samples
    build = functools.partial(prompts.build_student_prompt, plan.tokenizer, plan.evaluation)
    asked = [prompt for prompt in map(build, rows) for _ in range(n)]
    ids = [row.id for row in rows for _ in range(n)]
    keys = request.derive_sampling_keys(
        plan.config.seed, "evaluation", 0, ids, list(range(n)) * len(rows)
    )
    completions = _sample_evaluation(r, policy, asked, ids, keys, progress, partial)
    texts = [loaded_run.decode_completion(r, completion.ids) for completion in completions]
    golds = [row.answer for row in rows for _ in range(n)]
    grades = [
        reward_functions.Verdict(0.0, False, None, said.finish, "", said.detail)
        if said.finish in loop.DROPPED
        else grade
        for grade, said in zip(
            loaded_run.grade_completions(r, golds, asked, texts), completions, strict=True
        )
    ]
    samples = [
        {"answer": grade.answer, "correct": grade.correct, "status": grade.status,
         "detail": grade.detail, "tokens": len(said.ids), "truncated": said.finish == "length",
         "text": text}
        for grade, said, text in zip(grades, completions, texts, strict=True)
    ]  # fmt: skip
    _refuse_lost_samples(samples)
    records = [
        {"id": row.id, "lang": row.lang, "group": row.group, "gold": row.answer,
         "problem": row.problem, "samples": samples[k * n : (k + 1) * n]}
        for k, row in enumerate(rows)
    ]  # fmt: skip
    # maj@n compares answers under time limits, so another process could get another result.
    return {
        "scores": processes.run_on_leader(lambda: _score_evaluation(r, records)),
        "problems": records,
    }


class _Said(NamedTuple):
    """The part of a completion that an evaluation keeps: the ids, and why the completion ended."""

    ids: list[int]
    finish: str
    detail: str = ""


def _sample_evaluation(
    r: loaded_run.LoadedRun, policy, asked, ids, keys, progress, partial
) -> list[_Said]:
    """Reads the completions that the file has, and samples the completions that the file lacks.

    The first line of the file describes the evaluation. Every other line contains one completion,
    such as `{"index": 3, "id": "row 1", "ids": [5, 9], "finish": "stop"}`.
    """
    said: dict[int, _Said] = {}
    if partial is not None:
        what = _describe_evaluation(r, asked, policy)
        said = processes.run_on_leader(lambda: _read_partial_evaluation(partial, what, ids))
    todo = [i for i in range(len(asked)) if i not in said]
    # All processes draw the same completions, but only the leader stores the completions.
    file = partial if processes.is_leader() else None
    with storage.Appender(file) if file else contextlib.nullcontext() as stream:

        def done(k: int, completion: loop.Completion) -> None:
            i = todo[k]
            said[i] = _Said(list(completion.ids), completion.finish, completion.detail)
            if stream is not None and completion.finish not in loop.DROPPED:
                line = {"index": i, "id": ids[i], "ids": said[i].ids, "finish": said[i].finish}
                stream.append((json.dumps(line, ensure_ascii=False) + "\n").encode())

        def further(stats: loop.Stats) -> None:
            if progress is not None:
                progress(stats._replace(done=stats.done + len(asked) - len(todo)))

        failed, given_up = [], remote_engine.is_given_up
        while todo:
            made, _ = loaded_run.sample(
                r, policy, [asked[i] for i in todo], "eval", keys[todo], progress=further, done=done
            )
            failed += [x.detail for x in made if x.finish == "failed" and not given_up(x)]
            if failed_steps.is_majority_lost(len(failed), len(asked)):
                noun = "samples of an evaluation"
                why = failed_steps.describe_lost_completions("failed", failed, len(asked), noun)
                raise failures.EngineError(why)
            # If more than half of a call's samples failed, the call gives up its other samples. If
            # a continued evaluation lacks only a few samples, a few failures are enough for this.
            # Therefore this loop repeats the samples that a call gave up.
            todo = [i for i, x in zip(todo, made, strict=True) if given_up(x)]
    return [said[i] for i in range(len(asked))]


def _describe_evaluation(
    r: loaded_run.LoadedRun, asked: Sequence[prompts.Prompt], policy
) -> dict[str, Any]:
    """Returns the inputs that determine the completions: prompts, policy and settings."""
    c = r.plan.config
    digest = hashlib.sha256()
    for prompt in asked:
        digest.update(repr((prompt.prefix_ids, prompt.ids)).encode())
    drawn = config_lib.pick(c.eval, "max_tokens temperature top_p top_k min_p")
    how = config_lib.pick(c.sampler, "cache merge int8 engine model dialect logprobs")
    return {
        "prompts": len(asked),
        "sha256": digest.hexdigest(),
        "policy": _fingerprint_evaluated_policy(policy),
        "seed": c.seed,
        "stop": list(c.rollout.stop),
        **{f"eval.{name}": value for name, value in drawn.items()},
        **{f"sampler.{name}": value for name, value in how.items()},
    }


def _fingerprint_evaluated_policy(policy: policy_lib.Policy) -> list[int]:
    return fingerprints.fingerprint_arrays(
        policy.params if policy.adapter is None else policy.adapter
    )


def _read_partial_evaluation(
    partial: pathlib.Path, what: dict[str, Any], ids: Sequence[str]
) -> dict[int, _Said]:
    """Returns a stopped evaluation's completions, keyed by index; prepares the file for new ones.

    An incomplete last line is removed from the file, with a message. Completions of another policy
    or for other prompts are discarded with a message, and a new file is started. If the step was
    trained again, the policy can differ from the policy whose checksums the file contains. If
    eval.limit has been changed, the prompts differ.
    """
    free = ("policy", "prompts", "sha256")
    try:
        rows, raw = evaluation_files.read_partial(partial) if partial.is_file() else ([], [b""])
        head, *lines = rows or [{}]
        kept = (line for line in lines if line["finish"] not in loop.DROPPED)
        said = {line["index"]: _Said(line["ids"], line["finish"]) for line in kept}
        other = sorted(k for k in what if head and k not in free and head[k] != what[k])
        same = bool(head) and all(head[k] == what[k] for k in free)
        fit = all(ids[line["index"]] == line["id"] and line["index"] >= 0 for line in lines if same)
    except ValueError as error:
        raise failures.UnusableFile(str(error)) from error
    except (KeyError, IndexError) as error:
        raise failures.UnusableFile(f"{partial} is damaged: remove this file") from error
    if other or not fit:
        raise failures.UnusableFile(
            f"{partial} was written by an evaluation with other {', '.join(other) or 'problems'}: "
            "remove this file"
        )
    if torn := raw[-1]:
        print(f"{partial} ended in an incomplete line of {len(torn)} bytes: it is dropped")
    if not same:
        if lines:
            whose = "another policy or of other prompts"
            print(f"{partial} has completions of {whose}: they are drawn again", flush=True)
        with storage.explain(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(partial, [json.dumps(what) + "\n"])
        return {}
    if torn:
        storage.write_whole(partial, [line + b"\n" for line in raw[:-1]])
    return said


def _find_lost(samples: Sequence[dict]) -> dict[str, list[str]]:
    """Returns the reasons why samples were lost, keyed by the kind of loss."""
    lost = collections.defaultdict(list)
    for sample in samples:
        if loss := failed_steps.find_failure_cause(sample["status"], sample["detail"]):
            lost[loss].append(sample["detail"])
    return lost


def _refuse_lost_samples(samples: Sequence[dict]) -> None:
    """Refuses an evaluation that lost more than half of its samples."""
    lost = _find_lost(samples)
    if not failed_steps.is_majority_lost(sum(map(len, lost.values())), len(samples)):
        return
    most = max(lost, key=lambda loss: len(lost[loss]))
    noun = "samples of an evaluation"
    lines = [
        failed_steps.describe_lost_completions(k, v, len(samples), noun) for k, v in lost.items()
    ]
    if most == "unrewarded":
        lines.append("correct the function, and begin the run in another --workdir")
    kinds = {"nonfinite": nonfinite.NonFinite, "unrewarded": failures.RefusedRun}
    raise kinds.get(most, failures.EngineError)("; ".join(lines))


def _score_evaluation(
    r: loaded_run.LoadedRun, records: Sequence[dict]
) -> dict[str, dict[str, float]]:
    """Returns the scores of each language and group, keyed by the names of `group_records`."""

    def sample(s: dict) -> scoring.Sample:
        return scoring.Sample(s["answer"], s["correct"], s["status"], s["tokens"], s["truncated"])

    out = {}
    for name, part in eval_tables.group_records(records).items():
        samples = [[sample(s) for s in record["samples"]] for record in part]
        out[name] = scoring.score(samples, r.grader.same_class, graders.UNRESOLVED)
    return out


def read_evaluation(file: pathlib.Path, rows: Sequence[problem_row.Row]) -> dict[str, Any] | None:
    """Reads the result of an evaluation; returns None if the result lacks a problem in `rows`.

    This is the case if the file does not exist, or if eval.limit was raised after the evaluation.
    A result that has additional problems is returned unchanged.

    Args:
      file: the file of the result.
      rows: the problems to evaluate on.
    """
    if not file.is_file():
        return None
    result = evaluation_files.read_evaluation(file)
    known = {(record["id"], record["problem"]) for record in result["problems"]}
    missing = sum((row.id, row.problem) not in known for row in rows)
    if missing:
        print(
            f"{file} lacks {missing} of {len(rows)} problems, so all are evaluated now",
            flush=True,
        )
    return None if missing else result


def fits_policy(
    r: loaded_run.LoadedRun, state: train_step.State, result: dict[str, Any], file: pathlib.Path
) -> bool:
    """Returns whether a result belongs to the student of a state, and prints a line if it does not.

    A step that is trained again can have another policy, for example after a change of train.steps.
    Results of earlier versions have no checksums, and count as results of the student.
    """
    student = loaded_run.derive_run_policies(r, state)[0]
    fits = result.get("policy") in (None, _fingerprint_evaluated_policy(student))
    if not fits:
        print(f"{file} is the result of another policy: the step is evaluated again", flush=True)
    return fits


def evaluate_step(
    r: loaded_run.LoadedRun, state: train_step.State, step: int, file: pathlib.Path, label: str
) -> dict[str, Any]:
    """Evaluates a state's student, shows a progress line, and writes the result to a file.

    Args:
      r: the loaded run, with an open grader.
      state: the state with the student's weights.
      step: the step number, which is stored in the result.
      file: the file for the result. If an earlier evaluation for this file was stopped, this call
        continues that evaluation; see `evaluate`.
      label: the text at the start of the progress line.

    Returns:
      The result of `evaluate`, together with the step number and the policy's checksums.

    Raises:
      failures.UnusableFile: the file of a stopped evaluation is damaged, or belongs to another
        evaluation.
    """
    rows, partial = r.plan.eval_rows, workdir.partial_file(file)
    total, stream = len(rows) * r.plan.config.eval.samples, processes.progress_stream()
    progress, seen = terminal.Progress(label, total, stream=stream), [0]
    waiting = terminal.Activity(f"{label} compiling, and sampling the first completions", stream)

    def update(stats: loop.Stats) -> None:
        waiting.stop()
        busy = {} if math.isnan(stats.occupancy) else {"occupancy": stats.occupancy}
        progress.update(stats.done, stats.tokens - seen[0], **busy)
        seen[0] = stats.tokens

    with progress, waiting:
        student = loaded_run.derive_run_policies(r, state)[0]
        policy = _fingerprint_evaluated_policy(student)
        result = {"step": step, "policy": policy, **evaluate(r, student, rows, update, partial)}
    # The partial file is removed only after the result has been written.
    workdir.write_json(file, result)
    found = [sample for one in result["problems"] for sample in one["samples"]]
    for loss, details in _find_lost(found).items():
        line = failed_steps.describe_lost_completions(loss, details, len(found), "samples")
        print(streams.escape_stream_text(f"{label} {line}"), flush=True)
    processes.run_on_leader(lambda: storage.remove(partial))
    return result
