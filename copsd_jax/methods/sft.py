"""Supervised fine-tuning on the reference solutions, the baseline without rollouts.

    loss = -mean_t ln p(y_t | x, y_<t)

    x  the problem
    y  the solution and the answer of the row

Source: the SFT script of OPSD.

Departures from the sources:
  - The prompts and their template are the same as for the other methods.
  - The loss covers only the completion, and `policy.norm` selects the normaliser.
  - If a row's target is longer than `rollout.max_tokens`, the row is either dropped and counted, or
    refused.
"""

import numpy as np

from copsd_jax.problems import problem_row
from copsd_jax.teaching import prompts
from copsd_jax.training import layout, loaded_run, rollout_records, rollouts, train_step
from copsd_jax.training.rollouts import TrainStepInputs


def make_batch(
    r: loaded_run.LoadedRun, state: train_step.State, rows: list[problem_row.Row], step: int
) -> TrainStepInputs:
    """Encodes prompts and solutions, and lays them out; nothing is sampled.

    Args:
      r: the loaded run.
      state: not read; it is an argument because all methods have the same signature.
      rows: the problems of the step; every row has a solution.
      step: not read, like `state`.

    Returns:
      The inputs of the train step, with one record per row.
    """
    plan, c = r.plan, r.plan.config
    asked = [prompts.build_student_prompt(plan.tokenizer, plan.student, row) for row in rows]
    targets = [
        prompts.encode_target(plan.tokenizer, plan.student, row, c.rollout.stop, prompt.state)
        for row, prompt in zip(rows, asked, strict=True)
    ]
    batch = layout.build_batch(
        [prompt.ids for prompt in asked], None, targets, student_prefix=len(asked[0].prefix_ids)
    )
    ones_BC = np.ones(batch.mask_BC.shape, np.float32)
    batch = batch._replace(policy_BC=batch.mask_BC, advantage_BC=ones_BC)
    records = [
        {"id": row.id, "lang": row.lang, "sample": 0, "problem": row.problem,
         "student_prompt": prompt.text, "student_prompt_ids": [*prompt.prefix_ids, *prompt.ids],
         "completion": loaded_run.decode_completion(r, target), "completion_ids": list(target),
         "finish": "data", "gold": row.answer, "correct": None}
        for row, prompt, target in zip(rows, asked, targets, strict=True)
    ]  # fmt: skip
    metrics = {"completion_tokens": rollout_records.mean([len(target) for target in targets])}
    return TrainStepInputs(
        batch, *rollouts.encode_training_prefixes(r, state, asked[0], None), records, metrics
    )
