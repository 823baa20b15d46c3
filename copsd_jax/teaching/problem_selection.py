"""Loads a run's problems, and checks that the method, context, author and reward can use them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from copsd_jax.config import settings as config_lib
from copsd_jax.problems import languages, sources
from copsd_jax.problems.problem_row import Row
from copsd_jax.rewards import reward_functions
from copsd_jax.teaching import contexts, step_checker

Registry = Mapping[str, languages.Language]


def load_train_rows(
    config: config_lib.Config, context: contexts.Settings, registry: Registry
) -> sources.Loaded:
    """Returns the training rows, the number of dropped rows for each reason, and unread fields.

    Raises:
      ValueError: the reward, the context or the author cannot use the rows.
    """
    needs = list_needed_problem_fields(config, context)
    loaded = sources.load_source(
        config.data.path, config.data.lang, missing=config.data.missing,
        **_select_field_settings(config.data.path, config.data.fields, config.data.answer),
        needs=(*needs, *_need_options(config)),
        limit=config.data.limit, registry=registry,
    )  # fmt: skip
    rows = loaded.rows
    if config_lib.traits(config).samples:  # methods without sampling grade no training rows
        reward_functions.check_gold_answers(
            config.reward.kind, {row.id: row.answer for row in rows if row.answer}, "data.path",
            needed="answer" in needs,
        )  # fmt: skip
    if "other" in contexts.list_inputs(context):
        for lang in {row.lang for row in rows}:
            if len({row.answer for row in rows if row.lang == lang}) < 2:
                raise ValueError(
                    f"context.kind is {context.kind!r}: it needs problems with different answers, "
                    f"but all {lang!r} problems of data.path {config.data.path!r} share one answer"
                )
    if config.author.kind == "grader":
        unknown = [row for row in rows if not step_checker.can_check(row.solution, row.answer)]
        if unknown:
            raise ValueError(
                f"author.kind is 'grader': it needs solutions whose equations lead to the answer, "
                f"but {len(unknown)} of {len(rows)} rows have other solutions, such as "
                f"{unknown[0].id!r} with {unknown[0].solution[:80]!r}"
            )
    return loaded


def load_eval_rows(config: config_lib.Config, registry: Registry) -> sources.Loaded:
    """Returns the evaluation rows, the counts of dropped rows by reason, and unread fields."""
    if not config.eval.path:
        return sources.Loaded([], Counter())
    own, taught = config.eval, config.data
    fields_setting = "eval.fields"
    if taught.fields and not own.fields:
        fields_setting = "data.fields (eval.fields is '')"
    loaded = sources.load_source(
        own.path, own.lang or taught.lang, missing=taught.missing,
        **_select_field_settings(
            own.path, own.fields or taught.fields, own.answer or taught.answer
        ),
        needs=("answer", *_need_options(config)), limit=config.eval.limit, registry=registry,
        setting="eval.path", fields_setting=fields_setting,
    )  # fmt: skip
    reward_functions.check_gold_answers(
        config.reward.kind, {row.id: row.answer for row in loaded.rows}, "eval.path"
    )
    return loaded


def load_exemplars(config: config_lib.Config, registry: Registry) -> tuple[Row, ...]:
    """Loads the worked examples: the first rows of the file prompt.exemplars_path.

    The setting prompt.exemplars gives the number of worked examples.

    Raises:
      ValueError: the file has fewer rows than prompt.exemplars requests.
    """
    count = config.prompt.exemplars
    if not count:
        return ()
    rows, _ = sources.load_rows(
        config.prompt.exemplars_path, (config.prompt.exemplars_lang,),
        **_select_field_settings(
            config.prompt.exemplars_path, config.data.fields, config.data.answer
        ),
        needs=("answer", "solution"), registry=registry, setting="prompt.exemplars_path",
    )  # fmt: skip
    if len(rows) < count:
        raise ValueError(
            f"prompt.exemplars is {count}: {config.prompt.exemplars_path} has only "
            f"{config_lib.spell_count(len(rows), 'row')}"
        )
    return tuple(rows[:count])


def _select_field_settings(path: str, fields: str, answer: str) -> dict[str, Any]:
    """Returns the settings that say how fields are read; bundled files need none."""
    own = not path.startswith("bundled:")
    return {"fields": fields, "answer": answer} if own else {}


def _need_options(config: config_lib.Config) -> tuple[str, ...]:
    """Returns ("options",) if reward.kind is choice, because problems must show their options."""
    return ("options",) if config.reward.kind == "choice" else ()


def check_language_shares(config: config_lib.Config, rows: list[Row], registry: Registry) -> None:
    """Refuses a language without rows if its weight in data.weights is above 0."""
    weights = tuple(config.data.weights) or (1.0,) * len(config.data.lang)
    found = {row.lang for row in rows}
    for code, weight in zip(config.data.lang, weights, strict=True):
        if weight and languages.resolve_code(code, registry) not in found:
            raise ValueError(
                f"data.lang is {code!r}: this language has no row; set its data.weights entry to 0"
            )


def list_needed_problem_fields(
    config: config_lib.Config, context: contexts.Settings
) -> tuple[str, ...]:
    """Lists the fields that each row must have for the method, the context and the author."""
    method = config_lib.traits(config)
    if not method.samples:
        return ("solution", "answer")
    if not method.teacher:
        return ("answer",)
    wanted = list(contexts.list_row_fields(context))
    if config.author.kind == "grader":
        wanted.append("solution")
    if config.policy.weight or config.context.filter_groups or config.context.correct == "skip":
        wanted.append("answer")
    return tuple(dict.fromkeys(wanted))
