"""`python -m copsd_jax.evaluate --workdir=W [--steps=0,12] [--path=FILE] [--lang=sw]`

Samples, grades and scores problems under a policy: avg@n, pass@n, maj@n, format rate, length,
truncated share, for each language and group of problems. The prompts, the grader and what ends a
text are those of training. As a program it evaluates the checkpoints of a work directory and
prints one table.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from copsd_jax import (
    checkpoint,
    data,
    graders,
    metrics,
    plans,
    prompts,
    run,
    train_step,
    workdir,
)
from copsd_jax import config as config_lib
from copsd_jax.sampler import host


def evaluate(
    r: run.Run,
    policy: train_step.Policy,
    rows: Sequence[data.Row],
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """`{'scores': {name: {...}}, 'samples': [...]}`; names are languages, and language/group.

    Random streams depend on the seed, the problem and the sample alone, so two policies meet the
    same noise.
    """
    plan, e, n = r.plan, r.plan.config.eval, r.plan.config.eval.samples
    asked = [
        prompt
        for row in rows
        for prompt in [prompts.student(plan.tokenizer, plan.evaluation, row)] * n
    ]
    ids = [row.id for row in rows for _ in range(n)]
    keys = host.stream_keys(plan.config.seed, "evaluation", 0, ids, list(range(n)) * len(rows))
    limit = e.max_tokens or plan.config.rollout.max_tokens
    completions = run.sample(
        r, policy, asked, run.sampling(r, "eval", limit), keys, e.slots, progress
    )
    texts = [run.text(r, completion.ids) for completion in completions]
    golds = [row.answer for row in rows for _ in range(n)]
    grades = run.grade(r, golds, asked, texts)
    samples = [
        [
            {
                "answer": grades[i].answer,
                "correct": grades[i].correct,
                "status": grades[i].status,
                "tokens": len(completions[i].ids),
                "truncated": completions[i].finish == "length",
                "text": texts[i],
            }
            for i in range(k * n, (k + 1) * n)
        ]
        for k in range(len(rows))
    ]
    records = [
        {"id": row.id, "lang": row.lang, "group": row.group, "gold": row.answer,
         "problem": row.problem, "samples": given}
        for row, given in zip(rows, samples, strict=True)
    ]  # fmt: skip
    return {"scores": _scores(r, records), "problems": records}


def groups(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Records by language, and by language/group where a language has several groups."""
    by_lang = collections.defaultdict(list)
    for record in records:
        by_lang[record["lang"]].append(record)
    out: dict[str, list[dict]] = {}
    for lang, mine in by_lang.items():
        parts = collections.defaultdict(list)
        for record in mine:
            parts[record["group"]].append(record)
        if len(parts) > 1:
            out.update({f"{lang}/{name or 'other'}": part for name, part in parts.items()})
        out[lang] = mine
    return out


def _scores(r: run.Run, records: Sequence[dict]) -> dict[str, dict[str, float]]:
    def sample(s: dict) -> metrics.Sample:
        return metrics.Sample(s["answer"], s["correct"], s["status"], s["tokens"], s["truncated"])

    return {
        name: metrics.score(
            [[sample(s) for s in record["samples"]] for record in part],
            r.grader.same_class,
            graders.UNRESOLVED,
        )
        for name, part in groups(records).items()
    }


def _averages(records: Sequence[dict]) -> dict[str, float]:
    return {
        record["id"]: metrics.avg_at_n([s["correct"] for s in record["samples"]])
        for record in records
    }


def comparison(before: dict, after: dict) -> str:
    """A table of two evaluations of the same problems, with the interval of the difference."""
    rows = []
    new = groups(after["problems"])
    for name, old in groups(before["problems"]).items():
        left, right = _averages(old), _averages(new[name])
        paired = metrics.paired(list(left.values()), [right[i] for i in left])
        scores = after["scores"][name]
        rows.append(
            [
                name,
                len(left),
                f"{before['scores'][name]['avg_at_n']:.1%}",
                f"{scores['avg_at_n']:.1%}",
                f"{paired.difference * 100:+.1f}",
                f"[{paired.low * 100:+.1f}, {paired.high * 100:+.1f}]",
                f"{paired.p:.2g}",
                f"{before['scores'][name]['format_rate']:.0%} > {scores['format_rate']:.0%}",
                f"{before['scores'][name]['truncated']:.0%} > {scores['truncated']:.0%}",
            ]
        )
    headers = ["problems", "n", "before", "after", "points", "95 % interval", "p", "format", "cut"]
    return metrics.table(headers, rows)


def overview(results: dict[int, dict]) -> str:
    """One row for each step and group."""
    rows = []
    for step, result in sorted(results.items()):
        for name, s in result["scores"].items():
            rows.append(
                [step, name, s["problems"], s["samples"], f"{s['avg_at_n']:.1%}",
                 f"[{s['low']:.1%}, {s['high']:.1%}]", f"{s['pass_at_n']:.1%}",
                 f"{s['maj_at_n']:.1%}", f"{s['format_rate']:.0%}", f"{s['truncated']:.0%}",
                 f"{s['mean_tokens']:.1f}"]
            )  # fmt: skip
    headers = ["step", "problems", "n", "samples", "avg@n", "95 % interval", "pass@n", "maj@n",
               "format", "cut", "tokens"]  # fmt: skip
    return metrics.table(headers, rows)


def parse(argv: list[str]) -> argparse.Namespace:
    """The program's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m copsd_jax.evaluate",
        description="Evaluates checkpoints of a work directory with its own settings.",
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a run's directory")
    parser.add_argument(
        "--steps", default="", help="checkpoints, as 0,12 (0 is the initial policy); default: all"
    )
    parser.add_argument("--path", default="", help="other problems than the run's eval.path")
    parser.add_argument("--lang", default="", help="other languages, as sw,fr")
    parser.add_argument("--samples", type=int, default=None, help="completions per problem (n)")
    parser.add_argument("--temperature", type=float, default=None, help="of sampling; 0: greedy")
    parser.add_argument("--max_tokens", type=int, default=None, help="longest completion")
    parser.add_argument(
        "--out", type=pathlib.Path, default=None, help="directory of results; default W/eval"
    )
    return parser.parse_args(argv[1:])


def _config(args: argparse.Namespace) -> config_lib.Config:
    """The run's config with the flags' changes."""
    config = plans.saved_config(args.workdir)
    e, changes = config.eval, {}
    if args.path:
        changes["path"] = args.path
    if args.lang:
        changes["lang"] = tuple(args.lang.split(","))
    for name in ("samples", "max_tokens", "temperature"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if changes and args.out is None:
        raise ValueError(
            f"--out is missing: with other {', '.join(changes)} than the run's, name a directory "
            "of its own, so that W/eval stays what the run wrote"
        )
    e.update(changes)
    return config


def show(label: str, total: int) -> tuple[metrics.Progress, Callable[[int, int, int], None]]:
    """A progress line, and the sampler's callback that feeds it."""
    progress, seen = metrics.Progress(label, total), [0]

    def update(done: int, of: int, tokens: int) -> None:
        del of
        progress.update(done, tokens - seen[0])
        seen[0] = tokens

    return progress, update


def main(argv: list[str]) -> int:
    """Exit code: 0 only if every checkpoint asked for was evaluated."""
    args = parse(argv)
    try:
        config = _config(args)
        out = args.out or args.workdir / "eval"
        workdir.check_writable(out, "--out")
        plan = plans.make(config, train=False)
        if not plan.eval_rows:
            raise ValueError("eval.path is '': name problems with --path")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with (
        run.scope(plan),
        checkpoint.Checkpoints(args.workdir / "checkpoints") as checkpoints,
    ):
        saved = checkpoints.steps()
        try:
            asked = [int(s) for s in args.steps.split(",") if args.steps]
            steps = list(dict.fromkeys(asked)) or [0, *saved]
        except ValueError:
            print(f"error: --steps={args.steps}: write numbers as 0,12", file=sys.stderr)
            return 2
        absent = [step for step in steps if step not in (0, *saved)]
        if absent:
            print(f"error: --steps: no checkpoint of {absent}, there are {saved}", file=sys.stderr)
            return 2
        r, initial = run.load(plan, config.train.steps)
        results = {}
        with r.grader:
            for step in steps:
                state = checkpoints.load(step, initial) if step else initial
                progress, update = show(f"step {step}:", len(plan.eval_rows) * config.eval.samples)
                with progress:
                    result = evaluate(r, run.policies(r, state)[0], plan.eval_rows, update)
                results[step] = {"step": step, **result}
                out.mkdir(parents=True, exist_ok=True)
                workdir.write_json(out / workdir.step_file(out, "eval", step).name, results[step])
    print(overview(results))
    if 0 in results and len(results) > 1:
        last = max(results)
        print(f"\nstep {last} against step 0\n{comparison(results[0], results[last])}")
    print(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
