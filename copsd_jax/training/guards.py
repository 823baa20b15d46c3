"""Collapse guards: rules that check metrics and can warn, lower the learning rate or stop the run.

A rule is one string of `guards.rules`, without blanks:

    METRIC > LIMIT [@STEPS] : ACTION          (or < LIMIT)

    repetition>0.5:stop                        above 0.5 in one step
    entropy_student<0.1@3:lr*0.5               below 0.1 in 3 consecutive steps
    completion_tokens>2*first:warn             more than twice the run's first value

A NaN value is treated as beyond every limit. `warn` gives one warning each time the value crosses
the limit. `lr` lowers the learning rate after every STEPS consecutive steps beyond the limit.

A rule skips steps that lack the rule's metric, for example steps in which no token carried loss.
However, if the metric counts a status, a missing value is read as 0. A misspelled metric would
never be noticed during a run, so `check_metrics` checks all names before the run.

The guards' state is a small dictionary that is computed only from the lines of metrics.jsonl. A
continued run therefore makes the same decisions as an uninterrupted run.
"""

import copy
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import token_stats
from copsd_jax.rewards import reward_functions
from copsd_jax.teaching import replies, teacher_prompts, token_selection

GRAMMAR = (
    "a rule is METRIC>LIMIT or METRIC<LIMIT, then @STEPS (default: @1), then :ACTION; LIMIT is "
    "a number or NUMBER*first; the choices of ACTION are warn, stop, lr*FACTOR"
)

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    rf"(?P<metric>[A-Za-z_][\w./-]*)(?P<sign>[<>])(?P<limit>{_NUMBER})(?P<first>\*first)?"
    rf"(?:@(?P<patience>\d+))?:(?:(?P<plain>warn|stop)|lr\*(?P<factor>{_NUMBER}))"
)

# The metric `{name}_{status}` counts the completions whose status is `{status}`. A step may omit
# counts that are 0.
COUNTS = {
    "reply": tuple(replies.STATUSES),
    "located": ("untaught", *token_selection.STATUSES),
    "grade": tuple(reward_functions.STATUSES),
    "rollout": ("nonfinite", "failed"),
    "shortened": teacher_prompts.TRUNCATED_SECTIONS,
}
_PLAIN = """
    loss grad_norm update_norm bad failed no_loss learning_rate tokens completion_tokens truncated
    graded correct reward format informative repetition overlap logp_gap_mean logp_gap_max
    divergence loss_tokens logp_student logp_teacher entropy_student entropy_teacher clipped_mass
    ratio advantage advantage_negative
    policy_loss policy_tokens policy_entropy policy_ratio ratio_clipped kl_initial
    taught filtered overlong_teacher_prompts leaked replies_cut slot_occupancy
    fill_student fill_teacher micro_batches
    seconds/rollout seconds/sampler seconds/packing seconds/step
"""
METRICS = (
    *_PLAIN.split(),
    *(f"{name}_{kind}" for name in ("divergence", "advantage") for kind in token_stats.CLASSES),
    *(f"divergence_at_{bucket}" for bucket in token_stats.BUCKETS),
    *(f"{name}_{status}" for name, statuses in COUNTS.items() for status in statuses),
)
# Metrics that match `_SIGNED` are usually negative, so a rule on such a metric cannot use `*first`.
_SIGNED = re.compile("logp_(student|teacher)|advantage(?!_negative)")

State = dict[str, Any]  # {"factor", "stopped", "rules": [{"first", "over"}, ...]}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parsed rule of `guards.rules`.

    Attributes:
      metric: name of a metric.
      above: True if the rule fires above the limit, False if it fires below.
      limit: the limit. If `relative` is True, `limit` is multiplied by the first value above 0 that
        the metric has in the run.
      relative: whether the rule was written with `*first`.
      patience: number of consecutive steps beyond the limit after which the rule fires. Steps
        without the metric are not counted.
      action: "warn", "lr" or "stop".
      factor: number by which the action "lr" multiplies the learning rate; 1 for other actions.
      text: the rule as it was written.
    """

    metric: str
    above: bool
    limit: float
    relative: bool
    patience: int
    action: str
    factor: float
    text: str


@dataclasses.dataclass(frozen=True)
class Event:
    """A rule that fired.

    Attributes:
      step: number of the step, as in metrics.jsonl.
      action: "warn", "lr" or "stop".
      text: a readable message with the metric, its value, the limit, the steps and the action.
    """

    step: int
    action: str
    text: str


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Parses the rules of `guards.rules`.

    Raises:
      ValueError: a text is not a valid rule, a text occurs twice, or a rule would fire either never
        or always.
    """
    rules = tuple(_parse_guard_rule(text) for text in texts)
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise _refusal(text, "it occurs twice")
    return rules


def check_metrics(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Checks that the metric of every rule is in `METRICS`, and returns the rules.

    Raises:
      ValueError: a metric is unknown, or a rule with `*first` has a metric that is usually
        negative. For an unknown metric, the message names similar metrics.
    """
    for rule in rules:
        if rule.metric not in METRICS:
            near = difflib.get_close_matches(rule.metric, METRICS, n=3, cutoff=0.6)
            which = f"did you mean {' or '.join(near)}?"
            if not near:
                families = ", ".join(f"{name}_STATUS" for name in COUNTS)
                which = f"the metrics are {', '.join(_PLAIN.split())}, the metrics of token "
                which += f"classes and positions, and the counts {families}"
            raise _refusal(rule.text, f"there is no metric {rule.metric!r}: {which}")
        if rule.relative and _SIGNED.match(rule.metric):
            raise _refusal(rule.text, f"{rule.metric} is usually below 0, so it has no *first")
    return rules


def _refusal(text: str, reason: str) -> ValueError:
    """Returns the error that refuses a rule and states the reason."""
    return ValueError(f"guards.rules has {text!r}: {reason}")


def _parse_guard_rule(text: str) -> Rule:
    """Parses one rule."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise _refusal(text, GRAMMAR)
    rule = Rule(
        metric=match["metric"],
        above=match["sign"] == ">",
        limit=float(match["limit"]),
        relative=match["first"] is not None,
        patience=int(match["patience"] or 1),
        action=match["plain"] or "lr",
        factor=float(match["factor"] or 1),
        text=text,
    )
    if rule.patience < 1:
        raise _refusal(text, "STEPS must be at least 1")
    if rule.action == "lr" and not 0 < rule.factor < 1:
        raise _refusal(text, "FACTOR of lr*FACTOR must be above 0 and below 1")
    if not math.isfinite(rule.limit):
        raise _refusal(text, "LIMIT must be finite")
    if rule.relative and (rule.limit < 1 if rule.above else not 0 < rule.limit <= 1):
        raise _refusal(text, "NUMBER must be at least 1 with >, and above 0 and at most 1 with <")
    return rule


def init_guard_state(rules: Sequence[Rule]) -> State:
    """Returns the guards' state before the first step.

    The entry `factor` of a state is the product of all learning-rate factors so far. The entry
    `stopped` is the reason why the run stops, or "" if the run goes on.
    """
    memory = [{"first": None, "over": 0} for _ in rules]
    return {"factor": 1.0, "stopped": "", "rules": memory}


def apply_rules(
    rules: Sequence[Rule], state: State, step: int, metrics: Mapping[str, Any]
) -> tuple[State, list[Event]]:
    """Applies the rules to the metrics of one step.

    Args:
      rules: the rules of the run.
      state: the state before the step; `apply_rules` does not change it.
      step: number of the step, as in metrics.jsonl and in the events' messages.
      metrics: the metrics of the step by name. A value may be a string such as "nan", as in
        metrics.jsonl.

    Returns:
      The state after the step, and one event for each rule that fired.
    """
    state = copy.deepcopy(state)
    events = []
    for rule, memory in zip(rules, state["rules"], strict=True):
        if rule.metric in metrics:
            value = float(metrics[rule.metric])
        elif rule.metric.startswith(tuple(f"{name}_" for name in COUNTS)):
            value = 0.0
        else:
            continue  # the step lacks the rule's metric, for example because no answer was graded
        limit = _find_guard_limit(rule, memory, value)
        beyond = math.isnan(value) or (value > limit if rule.above else value < limit)
        memory["over"] = memory["over"] + 1 if beyond else 0
        if not _fires(rule, memory["over"]):
            continue
        events.append(
            Event(step, rule.action, _format_guard_event(rule, step, value, limit, memory["over"]))
        )
        state["factor"] *= rule.factor
        if rule.action == "stop":
            state["stopped"] = state["stopped"] or events[-1].text
    return state, events


def _find_guard_limit(rule: Rule, memory: dict[str, Any], value: float) -> float:
    """Returns the absolute limit of a rule, and stores the metric's first finite value above 0.

    Some metrics, such as a divergence from the initial policy, begin at 0. Until a metric has a
    value above 0, its relative limit is infinite, and only NaN counts as beyond the limit.
    """
    if memory["first"] is None and math.isfinite(value) and value > 0:
        memory["first"] = value
    if not rule.relative:
        return rule.limit
    if memory["first"] is None:
        return math.inf if rule.above else -math.inf
    return rule.limit * memory["first"]


def _fires(rule: Rule, over: int) -> bool:
    """Returns whether a rule fires after `over` consecutive steps beyond its limit.

    A rule fires once, after `patience` consecutive steps beyond its limit. As long as the value
    stays beyond the limit, an `lr` rule fires again every `patience` steps.
    """
    if rule.action == "lr":
        return over > 0 and over % rule.patience == 0
    return over == rule.patience


def _format_guard_event(rule: Rule, step: int, value: float, limit: float, over: int) -> str:
    """Formats an event's message."""
    side = "beyond" if math.isnan(value) else "above" if rule.above else "below"
    relative = f" ({rule.limit:.4g} x its first value)" if rule.relative else ""
    since = f"for {config_lib.spell_count(over, 'step')}"
    lowered = f"the learning rate is multiplied by {rule.factor:.4g}"
    done = {"warn": "a warning", "stop": "the run stops", "lr": lowered}[rule.action]
    return (
        f"step {step}: {rule.metric} is {value:.4g}, {side} {limit:.4g}{relative} {since}: {done} "
        f"(guards.rules {rule.text})"
    )


def replay_events(rules: Sequence[Rule], lines: Iterable[str]) -> tuple[State, list[Event]]:
    """Replays the lines of metrics.jsonl in order.

    Returns:
      The state after the last step, and all events.

    Raises:
      ValueError: a line is not a valid line of metrics.jsonl.
    """
    state, events = init_guard_state(rules), []
    for number, line in enumerate(lines, 1):
        try:
            metrics = json.loads(line)
            step = int(metrics["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is not from metrics.jsonl: {line[:80]!r}") from error
        state, new = apply_rules(rules, state, step, metrics)
        events += new
    return state, events


def rebuild_events(said: list[dict], replayed: Sequence[Event]) -> list[dict]:
    """Returns the entries of events.jsonl, and the replayed events that the file lacks."""
    known = {(entry["step"], entry["action"]) for entry in said}
    lost = [dataclasses.asdict(e) for e in replayed if (e.step, e.action) not in known]
    return sorted([*said, *lost], key=lambda entry: entry["step"])
