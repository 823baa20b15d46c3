"""Collapse guards: rules on a step's metrics that warn, lower the learning rate or stop the run.

A rule is one string of `guards.rules`, without blanks:

    METRIC > LIMIT [@STEPS] : ACTION          (or < LIMIT)

    repetition>0.5:stop                        above 0.5 in one step
    entropy_student<0.1@3:lr*0.5               below 0.1 in 3 steps in a row
    completion_tokens>2*first:warn             more than twice the run's first value

A value that is nan is beyond every limit. `warn` speaks once each time the limit is passed, `lr`
acts every STEPS steps for as long as it is. A step without the metric (no graded answer, no token
with loss) is passed over, but a count that is not there is 0: names are checked before the run, by
`check_metrics`, and not by what its first step happens to have. What the guards know is a small
dictionary that follows from the lines of metrics.jsonl alone, so that a continued run decides as
one in one piece.
"""

import copy
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copsd_jax.metrics import token_stats
from copsd_jax.rewards import reward_functions
from copsd_jax.teaching import replies, teacher_prompts, token_selection

ACTIONS = ("warn", "stop", "lr*FACTOR")
GRAMMAR = "METRIC>LIMIT or METRIC<LIMIT, then @STEPS if not 1, then :ACTION"

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    rf"(?P<metric>[A-Za-z_][\w./-]*)(?P<sign>[<>])(?P<limit>{_NUMBER})(?P<first>\*first)?"
    rf"(?:@(?P<patience>\d+))?:(?:(?P<plain>warn|stop)|lr\*(?P<factor>{_NUMBER}))"
)

# How many completions have each status: only the statuses that occur are written.
COUNTS = {
    "reply": tuple(replies.STATUSES),
    "located": ("untaught", *token_selection.STATUSES),
    "grade": tuple(reward_functions.STATUSES),
    "shortened": teacher_prompts.TRUNCATED_SECTIONS,
}
_PLAIN = """
    loss grad_norm update_norm learning_rate tokens completion_tokens truncated
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
# Below 0 as a rule: no limit is a multiple of their first value.
_SIGNED = re.compile("logp_(student|teacher)|advantage(?!_negative)")

State = dict[str, Any]  # JSON: {"steps", "factor", "stopped", "rules": [{"first", "over"}, ...]}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
      limit: of the metric; with `relative`, of its ratio to the run's first value above 0.
      above: fires above the limit, else below it.
      patience: steps in a row, of those that have the metric.
      action: "warn", "lr" or "stop".
      factor: of the learning rate, for "lr"; else 1.
      text: as it was written.
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
    """A rule that fired: `text` for people (metric, value, limit, steps, what is done)."""

    step: int
    action: str
    text: str


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of `guards.rules`.

    Raises:
      ValueError: for a rule that is none, could never or would always fire, or occurs twice.
    """
    rules = tuple(_parse(text) for text in texts)
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise _refusal(text, "it occurs twice")
    return rules


def check_metrics(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same rules, if every metric is one of `METRICS`, which some run can have.

    Raises:
      ValueError: naming the close ones.
    """
    for rule in rules:
        if rule.metric not in METRICS:
            near = difflib.get_close_matches(rule.metric, METRICS, n=3, cutoff=0.6)
            families = ", ".join(f"{name}_STATUS" for name in COUNTS)
            which = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"there are {', '.join(_PLAIN.split())}, those of token classes and "
                f"positions, and the counts {families}"
            )
            raise _refusal(rule.text, f"there is no metric {rule.metric!r}: {which}")
        if rule.relative and _SIGNED.match(rule.metric):
            raise _refusal(rule.text, f"{rule.metric} is below 0: a limit is no multiple of it")
    return rules


def _refusal(text: str, reason: str) -> ValueError:
    return ValueError(f"guards.rules has {text!r}: {reason}")


def _parse(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        reason = f"a rule is {GRAMMAR}; LIMIT is a number or NUMBER*first"
        raise _refusal(text, f"{reason}; the choices of ACTION are {', '.join(ACTIONS)}")
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
        raise _refusal(text, "@STEPS is at least 1")
    if rule.action == "lr" and not 0 < rule.factor < 1:
        raise _refusal(text, "lr*FACTOR lowers the learning rate: above 0 and below 1")
    if not math.isfinite(rule.limit):
        raise _refusal(text, "LIMIT is finite")
    if rule.relative and (rule.limit < 1 if rule.above else not 0 < rule.limit <= 1):
        raise _refusal(text, "NUMBER*first is at least 1 with >, and above 0 and at most 1 with <")
    return rule


def init_state(rules: Sequence[Rule]) -> State:
    """The state before the first step. `factor` is the learning rate's so far, `stopped` the reason
    why the run stops, or ""."""
    memory = [{"first": None, "over": 0} for _ in rules]
    return {"steps": 0, "factor": 1.0, "stopped": "", "rules": memory}


def apply_rules(
    rules: Sequence[Rule], state: State, step: int, metrics: Mapping[str, Any]
) -> tuple[State, list[Event]]:
    """The state after a step, and what its metrics ask for; `state` itself stays as it is.

    Args:
      step: as in metrics.jsonl, for the texts.
      metrics: numbers of the step by name; texts such as "nan" as metrics.jsonl has them.

    """
    state = copy.deepcopy(state)
    events = []
    for rule, memory in zip(rules, state["rules"], strict=True):
        if rule.metric in metrics:
            value = float(metrics[rule.metric])
        elif rule.metric.startswith(tuple(f"{name}_" for name in COUNTS)):
            value = 0.0
        else:
            continue  # a step without graded answers, or without long completions
        limit = _limit(rule, memory, value)
        beyond = math.isnan(value) or (value > limit if rule.above else value < limit)
        memory["over"] = memory["over"] + 1 if beyond else 0
        if not _fires(rule, memory["over"]):
            continue
        events.append(Event(step, rule.action, _text(rule, step, value, limit, memory["over"])))
        state["factor"] *= rule.factor
        if rule.action == "stop":
            state["stopped"] = state["stopped"] or events[-1].text
    state["steps"] += 1
    return state, events


def _limit(rule: Rule, memory: dict[str, Any], value: float) -> float:
    """The absolute limit; remembers the first finite value above 0: what begins with 0, as a
    divergence from the initial policy does, has no multiples yet. Before there is one the limit is
    the rule's side of infinity, which only nan is beyond."""
    if memory["first"] is None and math.isfinite(value) and value > 0:
        memory["first"] = value
    if not rule.relative:
        return rule.limit
    if memory["first"] is None:
        return math.inf if rule.above else -math.inf
    return rule.limit * memory["first"]


def _fires(rule: Rule, over: int) -> bool:
    """Once per excursion; `lr` again after each further `patience` steps."""
    if rule.action == "lr":
        return over > 0 and over % rule.patience == 0
    return over == rule.patience


def _text(rule: Rule, step: int, value: float, limit: float, over: int) -> str:
    side = "beyond" if math.isnan(value) else "above" if rule.above else "below"
    relative = f" ({rule.limit:.4g} x its first value)" if rule.relative else ""
    since = f"for {over} steps" if over > 1 else "for 1 step"
    done = {
        "warn": "a warning",
        "stop": "the run stops",
        "lr": f"the learning rate is multiplied by {rule.factor:.4g}",
    }[rule.action]
    return (
        f"step {step}: {rule.metric} is {value:.4g}, {side} {limit:.4g}{relative} {since}: {done} "
        f"(guards.rules {rule.text})"
    )


def replay_metrics(rules: Sequence[Rule], lines: Iterable[str]) -> State:
    """The state after the steps whose metrics.jsonl lines these are, in their order.

    Raises:
      ValueError: for a line that is no line of metrics.jsonl.
    """
    state = init_state(rules)
    for number, line in enumerate(lines, 1):
        try:
            metrics = json.loads(line)
            step = int(metrics["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no line of metrics.jsonl: {line[:80]!r}") from error
        state, _ = apply_rules(rules, state, step, metrics)
    return state
