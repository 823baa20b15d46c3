"""GRPO, the reinforcement-learning baseline; with other settings, it becomes Dr.GRPO or DAPO.

    A_i  = (r_i - mean_G r) / (std_G r + 1e-4)
    loss = mean over completions of mean_t of -min(rho A, clip(rho, 1 - low, 1 + high) A)
           + kl (exp(d) - d - 1),   d = ln p_0(y_t) - ln p(y_t),   rho = p(y_t) / p_old(y_t)

    r    rewards; mean_G and std_G are taken over the group (the completions of one problem)
    p    the student, p_0 the initial policy, p_old the policy of `policy.old`
    low, high, kl   `policy.clip_low`, `policy.clip_high`, `policy.kl`

Sources: DeepSeekMath (arXiv 2402.03300), in the form that TRL implements. Dr.GRPO (2503.20783) is
given by `policy.scale=none` and `policy.norm=constant`. DAPO (2503.14476) is given by
`policy.norm=token`, `policy.clip_high=.28` and `context.filter_groups=True`.

Departures from the sources:
  - There is one update per batch of rollouts. With one update per batch and `policy.old=trainer`,
    the ratio rho is exactly 1. With `policy.old=sampler`, the sampler's log-probabilities give
    p_old.
  - Groups that are filtered out are not replaced, so the step becomes smaller. DAPO samples new
    groups in place of the groups that it filters out.
  - The prompts, the grader and the report are the same as for the other methods.
"""

import numpy as np

from copsd_jax.losses import policy_loss
from copsd_jax.problems import problem_row
from copsd_jax.training import layout, loaded_run, rollout_records, rollouts, train_step
from copsd_jax.training.rollouts import Rollouts, TrainStepInputs


def make_batch(
    r: loaded_run.LoadedRun, state: train_step.State, rows: list[problem_row.Row], step: int
) -> TrainStepInputs:
    """Samples and grades rollouts, computes their advantages, and lays out the student's side.

    Completions of a row without a gold answer are not graded, so their rewards and advantages are
    0.

    Args:
      r: the loaded run.
      state: the state with the student's weights.
      rows: the problems of the step.
      step: the training step; it selects the random stream of sampling.

    Returns:
      The inputs of the train step, with one record per completion. The metric `informative` is the
      share of completions whose group has unequal rewards.
    """
    done = rollouts.sample_rollouts(r, state, rows, step)
    asked = [prompt.ids for prompt in done.asked]
    completions = [completion.ids for completion in done.completions]
    prefix = len(done.asked[0].prefix_ids)
    batch = layout.build_batch(asked, None, completions, student_prefix=prefix)
    batch = add_group_advantages(r.plan.config, done, batch, successes_only=False)
    records = rollout_records.build_records(r, done)
    for b, record in enumerate(records):
        record["advantage"] = float(batch.advantage_BC[b, 0])
    informative = policy_loss.mark_policy_loss_completions(done.rewards(), np.asarray(done.groups))
    metrics = rollout_records.measure_rollouts(records, done.sampler)
    metrics["informative"] = float(informative.mean())
    prefixes = rollouts.encode_training_prefixes(r, state, done.asked[0], None)
    return TrainStepInputs(batch, *prefixes, records, metrics)


def add_group_advantages(
    c, done: Rollouts, batch: layout.Batch, successes_only: bool
) -> layout.Batch:
    """Returns the batch with advantages, and with the mask of tokens that carry policy loss.

    All tokens of a completion have the same advantage. If the rewards of a group are all equal, its
    advantages are 0, and its tokens count in the normaliser, as published for GRPO. With
    context.filter_groups, the tokens of a group with equal rewards carry no policy loss, as in
    DAPO.

    Args:
      c: the settings of the run.
      done: the graded rollouts of the batch.
      batch: the layout of the rollouts, [B, C].
      successes_only: whether only correct completions carry policy loss.
    """
    rewards_B, groups_B = done.rewards(), np.asarray(done.groups)
    advantage_B = policy_loss.compute_advantages(rewards_B, groups_B, scale=c.policy.scale)
    success_B = np.array([bool(verdict and verdict.correct) for verdict in done.verdicts])
    kept_B = success_B if successes_only else groups_B >= 0  # below 0, the reward is unknown
    if c.context.filter_groups:
        kept_B = kept_B & policy_loss.mark_policy_loss_completions(rewards_B, groups_B)
    C = batch.mask_BC.shape[1]
    return batch._replace(
        policy_BC=batch.mask_BC & kept_B[:, None],
        advantage_BC=np.where(batch.mask_BC, advantage_B[:, None], 0.0).astype(np.float32),
        logp_rollout_BC=layout.pad_rows([d.logps for d in done.completions], C, np.float32),
    )
