"""Tables of the results of evaluations, and the groups of problems in a result."""

import collections
import operator
from collections.abc import Mapping, Sequence

from copsd_jax.metrics import scoring, terminal


def group_records(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Groups records by language, and also by language/group if a language has several groups.

    A record without a group is put into the group "other".
    """
    out: dict[str, list[dict]] = {}
    for lang, mine in _group(records, "lang").items():
        parts = _group(mine, "group")
        if len(parts) > 1:
            out |= {f"{lang}/{name or 'other'}": part for name, part in parts.items()}
        out[lang] = mine
    return out


def _group(records: Sequence[dict], field: str) -> dict[str, list[dict]]:
    """Groups records by the value of a field, in the order in which the values first occur."""
    out = collections.defaultdict(list)
    for record in records:
        out[record[field]].append(record)
    return out


def _averages(records: Sequence[dict]) -> dict[str, float]:
    """Returns each problem's share of correct samples, by the problem's id."""
    right = {record["id"]: [s["correct"] for s in record["samples"]] for record in records}
    return {row: scoring.avg_at_n(marks) for row, marks in right.items()}


def _average_samples(records: Sequence[dict]) -> tuple[float, float, float]:
    """Returns the shares of correct samples, samples with an answer, and truncated samples."""
    samples = [sample for record in records for sample in record["samples"]]
    marks = [(s["correct"], s["answer"] is not None, s["truncated"]) for s in samples]
    correct, formed, cut = (sum(column) / len(marks) for column in zip(*marks, strict=True))
    return correct, formed, cut


def _restrict_to_shared(before: dict, after: dict) -> tuple[list[dict], list[dict]]:
    """Returns the records of the problems that both evaluations have, in the order of `before`."""
    key = operator.itemgetter("id", "problem", "gold", "lang", "group")
    later = {key(record): record for record in after["problems"]}
    pairs = [(old, later[key(old)]) for old in before["problems"] if key(old) in later]
    return [old for old, _ in pairs], [new for _, new in pairs]


def format_eval_comparison(before: dict, after: dict) -> str:
    """Renders a table that compares two evaluations on the problems that both have.

    Args:
      before: a result of `evaluate`.
      after: the result of a later evaluation.

    Returns:
      The table. Each row gives the difference in points, the 95 % interval of a paired bootstrap
      over problems, and the p-value of an exact sign test.
    """
    rows = []
    old, new = map(group_records, _restrict_to_shared(before, after))
    for name in old:
        left, right = _averages(old[name]), _averages(new[name])
        paired = scoring.compare_paired_scores(list(left.values()), [right[i] for i in left])
        (a, formed_a, cut_a), (b, formed_b, cut_b) = map(_average_samples, (old[name], new[name]))
        rows.append(
            [name, len(left), f"{a:.1%}", f"{b:.1%}", f"{paired.difference * 100:+.1f}",
             f"[{paired.low * 100:+.1f}, {paired.high * 100:+.1f}]", f"{paired.p:.2g}",
             f"{formed_a:.0%} > {formed_b:.0%}", f"{cut_a:.0%} > {cut_b:.0%}"]
        )  # fmt: skip
    headers = ["problems", "n", "before", "after", "points", "95 % interval", "p", "format", "cut"]
    return terminal.table(headers, rows)


def format_markdown_scores(results: Mapping[str, dict]) -> str:
    """Renders a Markdown table with the scores of one or two evaluations and their 95 % intervals.

    Two evaluations are compared on the problems that both have, as in `format_eval_comparison`.

    Args:
      results: one or two results of `evaluate`, by the heading of their column, in order of time.
    """
    names, sides = list(results), [result["problems"] for result in results.values()]
    if len(names) == 2:
        sides = list(_restrict_to_shared(*results.values()))
    groups = [group_records(side) for side in sides]
    headers = ["problems", "n", *(f"{name} [95 % interval]" for name in names)]
    rows = []
    for group in groups[0]:
        scores = [_averages(side[group]) for side in groups]
        values = [[one[row] for row in scores[0]] for one in scores]
        cells = [group.replace("|", r"\|"), len(values[0])]
        for mean, low, high in map(scoring.compute_score_interval, values):
            cells.append(f"{mean:.1%} [{low:.1%}, {high:.1%}]")
        if len(values) == 2:
            paired = [100 * x for x in scoring.compare_paired_scores(values[0], values[1])[:3]]
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired))
        rows.append(cells)
    headers += ["points [95 % interval]"] * (len(names) == 2)
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def format_overview(results: Mapping[int, dict]) -> str:
    """Renders a table with one row for each group of problems at each step.

    Args:
      results: the results of `evaluate`, by step.
    """
    rows = [
        [step, name, s["problems"], s["samples"], f"{s['avg_at_n']:.1%}",
         f"[{s['low']:.1%}, {s['high']:.1%}]", f"{s['pass_at_n']:.1%}", f"{s['maj_at_n']:.1%}",
         f"{s['format_rate']:.0%}", f"{s['truncated']:.0%}", f"{s['mean_tokens']:.1f}"]
        for step, result in sorted(results.items()) for name, s in result["scores"].items()
    ]  # fmt: skip
    headers = ["step", "problems", "n", "samples", "avg@n", "95 % interval", "pass@n", "maj@n",
               "format", "cut", "tokens"]  # fmt: skip
    return terminal.table(headers, rows)
