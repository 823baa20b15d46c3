"""Failed steps: steps whose completions, replies or rewards a server or a function did not give.

A failed step is skipped: no token carries loss, so weights and optimizer stay as they were. The
metric `failed` counts it. `runtime/bad_steps.py` decides when failed steps stop a run.
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


def drop_failed_loss(
    c: config_lib.Config, records: Sequence[dict], batch: layout.Batch
) -> tuple[layout.Batch, bad_steps.Failure | None]:
    """Returns the part of a step's loss that is usable, and why the step failed.

    A step failed if the sampler's server failed for more than half of the completions, if the
    reward function raised for all completions, or if a server is the author and no reply is usable.
    In the last case, the policy loss needs no reply: if tokens carry it, only the distillation is
    dropped, and the step did not fail, unless the server refused every request.

    Args:
      c: the settings of the run.
      records: the records of the step's completions.
      batch: the step's batch.

    Returns:
      The batch, without any token that carries loss if the step failed; and the failure, or None.
    """
    policy_BC, nothing_BC = batch.policy_BC, np.zeros_like(batch.loss_BC)
    failure = _find_lost_completions(records) or _find_raised_rewards(c, records)
    replies_lost = None if failure else _find_lost_replies(c, records)
    if replies_lost and policy_BC is not None and policy_BC.any() and not replies_lost.refused:
        return batch._replace(loss_BC=nothing_BC), None
    # A server that refuses every request needs the user, whatever else the step could teach.
    failure = failure or replies_lost
    if failure:
        policy_BC = None if policy_BC is None else np.zeros_like(policy_BC)
        batch = batch._replace(loss_BC=nothing_BC, policy_BC=policy_BC)
    return batch, failure


def _find_lost_completions(records: Sequence[dict]) -> bad_steps.Failure | None:
    lost = [record for record in records if record["finish"] == "failed"]
    if 2 * len(lost) <= len(records):
        return None
    return bad_steps.Failure(
        f"{len(lost)} of {len(records)} completions failed, the first: {lost[0]['finish_detail']}"
    )


def _find_raised_rewards(c: config_lib.Config, records: Sequence[dict]) -> bad_steps.Failure | None:
    statuses = [x.get("grade_status", "") for x in records]
    raised = [status for status in statuses if status.startswith("raised:")]
    if not raised or any(x.get("correct") is not None for x in records):
        return None
    return bad_steps.Failure(
        f"{c.reward.kind} (reward.kind) raised for all {len(raised)} completions, the first "
        f"time {raised[0].partition(':')[2]}"
    )


def _find_lost_replies(c: config_lib.Config, records: Sequence[dict]) -> bad_steps.Failure | None:
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
        f"none of the {len(asked)} replies of {c[source].url} ({source}.url) could be used, the "
        f"first is {statuses[0]}: {reason}",
        # A server that refused requests until they were changed, and then gave nothing usable, is
        # as wrong as one that refuses every request.
        refused=set(statuses) == {"refused"} or bool(again),
    )
