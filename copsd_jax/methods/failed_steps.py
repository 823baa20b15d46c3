"""Failed steps: steps for which a server or a function gave too few usable results.

The results are completions, replies and rewards. A failed step is skipped: no token carries loss,
so weights and optimizer stay as they were. The metric `failed` counts the failed steps.
`runtime/bad_steps.py` decides when failed steps stop a run. An evaluation is refused if more than
half of its samples were lost.
"""

from collections.abc import Sequence

import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import bad_steps
from copsd_jax.servers import chat
from copsd_jax.teaching import replies
from copsd_jax.training import layout

# Statuses of completions for which no reply was requested.
_NOT_REQUESTED = ("none", "filtered", "not_asked")
# Descriptions of the ways in which completions are lost.
_LOST = {
    "failed": "failed",
    "nonfinite": "have logits that are not finite",
    "unrewarded": "got no reward from the function of reward.kind",
}


def find_failure_cause(status: str, detail: str) -> str:
    """Returns the key in `_LOST` for a lost sample of an evaluation; "" for any other sample."""
    return status if status in _LOST else "unrewarded" if detail else ""


def is_majority_lost(lost: int, total: int) -> bool:
    """Returns whether more than half of the results were lost.

    If more than half were lost, the other results do not count either.
    """
    return 2 * lost > total


def describe_lost_completions(
    loss: str, details: Sequence[str], total: int, noun: str = "completions"
) -> str:
    """Describes lost completions, such as "2 of 8 completions failed, the first: HTTP 500".

    Args:
      loss: how the completions were lost; see `find_failure_cause`.
      details: the reason for each lost completion; "" if no reason is known.
      total: the number of completions, lost or not.
      noun: the word for the completions.
    """
    first = f", the first: {details[0]}" if details[0] else ""
    return f"{len(details)} of {total} {noun} {_LOST[loss]}{first}"


def loses_most_logits(records: Sequence[dict]) -> bool:
    """Returns whether the logits of more than half of the completions were not finite."""
    return is_majority_lost(sum(x["finish"] == "nonfinite" for x in records), len(records))


def drop_failed_loss(
    c: config_lib.Config, records: Sequence[dict], batch: layout.Batch
) -> tuple[layout.Batch, bad_steps.Failure | None]:
    """Returns the part of a step's loss that is usable, and why the step failed.

    A step failed in each of these cases:

    1. The sampler's server failed for more than half of the completions.
    2. More than half of the completions to grade got no reward from the reward function.
    3. The author is a server, and no reply is usable.
    4. The author is the student or the teacher, and the sampler's server failed for every reply.

    In cases 3 and 4, the policy loss can still be used, because it needs no reply. If tokens carry
    policy loss and the server did not refuse every request, only the distillation loss is dropped,
    and the step does not count as failed. If the logits of more than half of the completions were
    not finite, the step is bad. No part of the loss of a bad step is usable.

    Args:
      c: the settings of the run.
      records: the records of the step's completions.
      batch: the step's batch.

    Returns:
      The batch, and the failure or None. If the step failed or is bad, no token carries loss.
    """
    policy_BC, nothing_BC = batch.policy_BC, np.zeros_like(batch.loss_BC)
    no_policy_BC = None if policy_BC is None else np.zeros_like(policy_BC)
    nothing = batch._replace(loss_BC=nothing_BC, policy_BC=no_policy_BC)
    if loses_most_logits(records):
        return nothing, None
    failure = _find_lost_completions(records) or _find_lost_rewards(records)
    replies_lost = None if failure else _find_lost_author_replies(c, records)
    if replies_lost and policy_BC is not None and policy_BC.any() and not replies_lost.refused:
        return batch._replace(loss_BC=nothing_BC), None
    # If a server refuses every request, the user must act, so the policy loss is dropped too.
    failure = failure or replies_lost
    return (nothing if failure else batch), failure


def _find_lost_completions(records: Sequence[dict]) -> bad_steps.Failure | None:
    lost = [record["finish_detail"] for record in records if record["finish"] == "failed"]
    if not is_majority_lost(len(lost), len(records)):
        return None
    return bad_steps.Failure(describe_lost_completions("failed", lost, len(records)))


def _find_lost_rewards(records: Sequence[dict]) -> bad_steps.Failure | None:
    lost = list_lost_rewards(records)
    graded = len(lost) + sum(x.get("correct") is not None for x in records)
    if not is_majority_lost(len(lost), graded):
        return None
    return bad_steps.Failure(describe_lost_completions("unrewarded", lost, graded))


def list_lost_rewards(records: Sequence[dict]) -> list[str]:
    """Lists what the reward function raised or returned for each completion without a reward."""
    return [record["grade_detail"] for record in records if record.get("grade_detail")]


def _find_lost_author_replies(
    c: config_lib.Config, records: Sequence[dict]
) -> bad_steps.Failure | None:
    asked = [x for x in records if x.get("reply_status", "none") not in _NOT_REQUESTED]
    statuses = [record["reply_status"] for record in asked]
    if c.author.kind == "server":
        unusable, source = not any(replies.STATUSES[x].usable for x in statuses), "author"
    else:  # the model writes the replies; with sampler.engine=server, it is on a server
        unusable, source = set(statuses) == {"failed"}, "sampler"
    if not asked or not unusable:
        return None
    details = [record["reply_detail"] for record in asked]
    again = next(filter(chat.was_refused_at_first, details), "")
    reason = replies.STATUSES[statuses[0]].meaning
    reason = f"{reason}; {again}" if again else details[0] or reason
    return bad_steps.Failure(
        f"none of the {len(asked)} replies of {c[source].url} ({source}.url) could be used; the "
        f"first is {statuses[0]}: {reason}",
        # A server may refuse requests until they are changed, and then give no usable reply. Such a
        # server is treated like a server that refuses every request.
        refused=set(statuses) == {"refused"} or bool(again),
    )
