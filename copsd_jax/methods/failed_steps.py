"""Failed steps: steps whose completions, replies or rewards a server or a function did not give.

A failed step is skipped: no token carries loss, so weights and optimizer stay as they were. The
metric `failed` counts it. `runtime/bad_steps.py` decides when failed steps stop a run.
"""

from collections.abc import Sequence

import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import bad_steps
from copsd_jax.teaching import replies
from copsd_jax.training import layout

# Statuses of completions for which no reply was requested.
_NOT_REQUESTED = ("none", "filtered", "not_asked")


def find_failure(c: config_lib.Config, records: Sequence[dict]) -> bad_steps.Failure | None:
    """Returns why a step failed, or None if it did not.

    A step failed if the sampler's server failed for more than half of the completions, if a server
    is the author and no reply is usable, or if the reward function raised for all completions.

    Args:
      c: the settings of the run.
      records: the records of the step's completions.
    """
    lost = [record for record in records if record["finish"] == "failed"]
    if 2 * len(lost) > len(records):
        return bad_steps.Failure(
            f"{len(lost)} of {len(records)} completions failed, the first: "
            f"{lost[0]['finish_detail']}"
        )
    asked = [x for x in records if x.get("reply_status", "none") not in _NOT_REQUESTED]
    statuses = [record["reply_status"] for record in asked]
    usable = any(replies.STATUSES[status].usable for status in statuses)
    if c.author.kind == "server" and asked and not usable:
        detail = asked[0]["reply_detail"] or replies.STATUSES[statuses[0]].meaning
        return bad_steps.Failure(
            f"none of the {len(asked)} replies of {c.author.url} (author.url) could be used, the "
            f"first is {statuses[0]}: {detail}",
            refused=set(statuses) == {"refused"},
        )
    graded = [x["grade_status"] for x in records if x.get("correct") is not None]
    if graded and all(status.startswith("raised:") for status in graded):
        return bad_steps.Failure(
            f"{c.reward.kind} (reward.kind) raised for all {len(graded)} completions, the first "
            f"time {graded[0].partition(':')[2]}"
        )
    return None


def drop_loss(batch: layout.Batch) -> layout.Batch:
    """Returns a step's batch without any token that carries loss."""
    policy_BC = None if batch.policy_BC is None else np.zeros_like(batch.policy_BC)
    return batch._replace(loss_BC=np.zeros_like(batch.loss_BC), policy_BC=policy_BC)
