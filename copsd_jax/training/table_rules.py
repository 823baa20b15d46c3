"""Checks the settings whose value names an entry of a table, such as the table of rewards.

`main` first checks all other settings with `config.setting_rules`, which imports no table.
"""

from collections.abc import Collection, Mapping
from typing import Any

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.losses import divergence_loss, divergences
from copsd_jax.metrics import callback
from copsd_jax.model import transformer
from copsd_jax.rewards import reward_functions
from copsd_jax.servers import dialects, remote_engine
from copsd_jax.teaching import contexts, conversations


def collect_choice_tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Returns the entries of each setting's table, with the settings that each entry reads.

    Returns:
      {setting: {entry: names of settings}}; an entry that reads no settings has an empty tuple.
    """
    entries = {
        "context.kind": contexts.CONTEXTS,
        "reward.kind": reward_functions.REWARDS,
        "loss.divergence": divergences.DIVERGENCES,
    }
    found = {
        name: {key: entry.settings for key, entry in table.items()}
        for name, table in entries.items()
    }
    found["loss.divergence"]["sampled"] = ()
    names = {
        "model.shape": ("", *transformer.SHAPES),
        "prompt.answer": conversations.ANSWER_FORMS,
        "loss.top_k_of": divergences.TOP_K_OF,
        "loss.clip_mode": divergences.CLIP_MODES,
        "loss.implementation": divergence_loss.CHOICES,
        "sampler.dialect": dialects.DIALECTS,
        "sampler.logprobs": remote_engine.LOGPROBS,
    }
    return found | {name: dict.fromkeys(table, ()) for name, table in names.items()}


def check_choices(config: config_lib.Config, *, train: bool = True, data: bool = True) -> None:
    """Checks the settings against the tables, after the checks of `setting_rules.check_settings`.

    Args:
      config: the settings of a run.
      train: whether the run will train.
      data: whether problems will be read.

    Raises:
      ValueError: a setting cannot work; the message names the setting, its value and the choices.
    """
    setting_rules.check_settings(config, collect_choice_tables(), train=train, data=data)
    s = config_lib.flat(config)
    reward_functions.import_function(s["reward.kind"])
    callback.import_callback(s["log.callback"])
    _check_context(s, context_settings(config))
    forms: Collection[str] = conversations.ANSWER_FORMS
    if s["reward.kind"] in reward_functions.REWARDS:
        forms = reward_functions.REWARDS[s["reward.kind"]].answer_forms
    if s["prompt.answer"] not in forms:
        rule = f"with reward.kind={s['reward.kind']} {config_lib.list_choices(forms)}"
        setting_rules.refuse(s, "prompt.answer", rule)


def context_settings(config: config_lib.Config) -> contexts.Settings:
    """Returns the settings of the context; methods without a teacher have the context "none".

    Args:
      config: the settings of a run.
    """
    c = config.context
    return contexts.Settings(
        kind=c.kind if config_lib.traits(config).teacher else "none",
        **config_lib.pick(c, "problem_en solution feedback section_tokens"),
        fallback=config.parity.reflection_fallback,
        published_tags=config.parity.reflection_tags,
    )


def _check_context(s: Mapping[str, Any], settings: contexts.Settings) -> None:
    """Refuses authors, token selections and group sizes that the context cannot use."""
    context, author = contexts.CONTEXTS[settings.kind], s["author.kind"]
    if author not in context.author_kinds:
        choices = config_lib.list_choices(context.author_kinds)
        setting_rules.refuse(s, "author.kind", f"with context.kind={settings.kind} {choices}")
    if s["tokens.select"] in ("from_error", "error_step") and not context.locates_error:
        locating = [name for name, entry in contexts.CONTEXTS.items() if entry.locates_error]
        rule = f"it works only with context.kind={', '.join(locating)}"
        setting_rules.refuse(s, "tokens.select", rule)
    # Without a successful sibling, only the authors `grader` and `file` can work.
    compares = "siblings" in context.inputs(settings) and author not in ("grader", "file")
    if compares and s["rollout.per_prompt"] < 2:
        why = f"context.kind={settings.kind}"
        why += f" with author.kind={author}" if author != "none" else ""
        setting_rules.refuse(s, "rollout.per_prompt", f"{why} needs at least 2")
