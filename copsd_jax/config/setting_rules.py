"""The checks of a run's settings; the checks need no files, weights or devices.

Every error message is one sentence that names a setting, its value and the allowed values. The
declaration of a setting (`declaration.Setting`) contains the setting's allowed values. This module
contains the rules that depend on several settings.
"""

import math
import re
from collections.abc import Mapping
from typing import NoReturn

from copsd_jax.config import methods
from copsd_jax.config import settings as config_lib
from copsd_jax.config.declaration import Choices, ListedBy


def check_settings(
    config: config_lib.Config,
    tables: config_lib.Tables = None,
    *,
    train: bool = True,
    data: bool = True,
) -> None:
    """Refuses invalid settings and invalid combinations; reads no files, weights or devices.

    Args:
      config: all settings.
      tables: the entries of each table, by the name of the setting that chooses an entry. If
        `tables` is None, the rules that depend on tables are skipped; the caller then need not
        import any table.
      train: whether the run will train. If `train` is false, settings that nothing reads are
        accepted, so that any saved run can be evaluated and exported.
      data: whether the run will read problems.

    Raises:
      ValueError: a setting is invalid; the message names the setting, its value, and the allowed
        values.
    """
    s = config_lib.flat(config)
    for name, setting in config_lib.SETTINGS.items():
        if isinstance(setting.allowed, Choices):
            _check_setting_choice(s, name, setting.allowed, tables)
        else:
            config_lib.check_range(name, s[name])
    if any(not isinstance(text, str) or not text for text in s["rollout.stop"]):
        refuse(s, "rollout.stop", "stop strings must be text, and must not be empty")
    for rule in (
        _check_author_settings,
        _check_engine_settings,
        _check_groups,
        _check_policy_settings,
        _check_loss_settings,
    ):
        rule(s)
    _check_data_settings(s, data)
    _check_train_settings(s, config_lib.completions_per_step(config))
    _check_processes(s)
    if train:
        _refuse_unread_settings(s, tables)


def check_top_k_settings(config: config_lib.Config, vocab_size: int) -> None:
    """Refuses a top_k above the size of the model's vocabulary.

    Raises:
      ValueError: a top_k is too large; the message names the setting.
    """
    s = config_lib.flat(config)
    for name in ("rollout.top_k", "eval.top_k", "author.top_k", "loss.top_k"):
        if s[name] > vocab_size:
            refuse(s, name, f"the model has {vocab_size} tokens (0 is off)")


def check_shard_settings(config: config_lib.Config, devices: int) -> None:
    """Refuses a micro-batch whose number of completions is not divisible by `devices`.

    With packed rows (train.pack), any number of completions is allowed.

    Args:
      config: all settings.
      devices: the number of devices that share a micro-batch (mesh.data x mesh.fsdp).

    Raises:
      ValueError: `devices` does not divide the number of completions in a micro-batch; the message
        names the setting that determines this number.
    """
    s = config_lib.flat(config)
    name = "train.micro_batch" if s["train.micro_batch"] else "train.batch"
    micro = s["train.micro_batch"] or config_lib.completions_per_step(config)
    if micro % devices and s["train.pack"] == "off":
        count = config_lib.spell_count(micro, "completion")
        rule = f"{count} per micro-batch cannot be split over {devices} devices"
        refuse(s, name, f"{rule} (mesh.data x mesh.fsdp)")


def refuse(s: Mapping, name: str, rule: str) -> NoReturn:
    """Raises a ValueError that names a setting, its value, and the rule that the value breaks."""
    raise ValueError(f"{name} is {config_lib.show(s[name])}: {rule}")


# -------------------------------------------------------------------------------- single settings


def _check_setting_choice(
    s: Mapping, name: str, allowed: Choices, tables: config_lib.Tables
) -> None:
    choices = config_lib.choices(name, tables)
    for value in (s[name],) if isinstance(s[name], str) else s[name]:
        known = value in choices or (allowed.function and re.fullmatch(r"[\w.]+:\w+", value))
        if choices and not known:
            shown = ", ".join(choice or "''" for choice in choices)
            raise ValueError(f"{name} is {config_lib.show(value)}: the choices are {shown}")


def _refuse_unread_settings(s: Mapping, tables: config_lib.Tables) -> None:
    """Refuses a setting that differs from its default if nothing would read the setting.

    If a condition names another setting, the condition need not repeat the other setting's
    conditions.
    """
    for name, setting in config_lib.SETTINGS.items():
        for when in setting.read_when if s[name] != setting.default else ():
            if not isinstance(when, ListedBy):
                holds = when.holds(s)
            else:
                holds = not tables or name in tables[when.setting].get(s[when.setting], ())
            if not holds:
                rule = f"nothing reads it, because it needs {config_lib.spell(name, when, tables)}"
                refuse(s, name, f"{rule}; without that, {name} must be {setting.default!r}")


# ------------------------------------------------------------------------ rules between settings


def _check_author_settings(s: Mapping) -> None:
    author = s["author.kind"]
    for name, needed in (("author.path", "file"), ("author.url", "server")):
        if author == needed and not s[name]:
            refuse(s, name, f"author.kind={author} needs a value here")
    if author != "grader":
        return
    if s["reward.kind"] != "answer":
        rule = "it reads final answers, so it needs reward.kind=answer"
        refuse(s, "author.kind", f"{rule}; reward.kind is {s['reward.kind']}")
    if s["eval.extract"] != "last_after_think":
        # eval.extract=last_anywhere may find an answer inside a think block that never ends. If the
        # answer is inside the thinking, no step of the solution contains the answer, because the
        # steps begin after the thinking.
        rule = "it reads only text after the thinking, so it needs eval.extract=last_after_think"
        refuse(s, "author.kind", f"{rule}; eval.extract is {s['eval.extract']}")


def _check_engine_settings(s: Mapping) -> None:
    """Refuses author.kind=teacher if the server cannot hold the teacher in addition to the student.

    A server holds either the base model and one adapter, or one full set of weights.
    """
    if s["sampler.engine"] != "server":
        return
    for name in ("sampler.url", "sampler.model"):
        if not s[name]:
            refuse(s, name, "sampler.engine=server needs a value here")
    weights, trainable = s["teacher.weights"], s["train.trainable"]
    held = weights == "live" or (trainable == "lora" and weights != "ema")
    if s["author.kind"] == "teacher" and not held:
        teacher = f"teacher.weights={weights} and train.trainable={trainable}"
        rule = f"a server (sampler.engine) holds only the student, not a teacher with {teacher}"
        refuse(s, "author.kind", f"{rule}; use student")


def _check_groups(s: Mapping) -> None:
    """Refuses a number of completions per problem that the method or another setting cannot use."""
    method = methods.METHODS[s["method"]]
    if not method.samples and s["rollout.per_prompt"] != 1:
        refuse(s, "rollout.per_prompt", f"method={s['method']} does not sample, so use 1")
    comparing = {
        f"method={s['method']}": method.policy_gradient,
        "policy.weight": s["policy.weight"] > 0,
        "context.filter_groups": s["context.filter_groups"] and method.teacher,
    }
    for name, compares in comparing.items():
        if compares and s["rollout.per_prompt"] < 2:
            refuse(s, "rollout.per_prompt", f"{name} needs at least 2")


def _check_policy_settings(s: Mapping) -> None:
    method = s["method"]
    if s["policy.weight"] and not methods.METHODS[method].teacher:
        refuse(s, "policy.weight", f"method={method} has no divergence to mix, so use 0")
    if s["policy.route"] != "all" and not s["policy.weight"]:
        refuse(s, "policy.route", "policy.weight is 0, so there is nothing to route")
    if s["policy.norm"] == "constant" and not methods.METHODS[method].samples:
        refuse(s, "policy.norm", f"method={method} needs sequence or token")
    if s["policy.rollout_clip"] and s["policy.old"] == "sampler":
        rule = "policy.old=sampler already has the sampler's probabilities in its ratio, so use 0"
        refuse(s, "policy.rollout_clip", rule)


def _check_loss_settings(s: Mapping) -> None:
    for name, off in (("loss.clip_mode", "none"), ("loss.top_k", 0)):
        if s["loss.divergence"] == "sampled" and s[name] != off:
            refuse(s, name, f"loss.divergence=sampled needs {name}={off}")
    if s["loss.top_k"] == 1 and not s["loss.tail"] and s["loss.top_k_of"] != "union":
        refuse(s, "loss.top_k", "a single entry renormalises to 1; use 2, or loss.tail=True")
    if s["loss.tail"] and not s["loss.top_k"]:
        refuse(s, "loss.tail", "loss.top_k is 0, so all tokens are summed and there is no tail")
    if s["loss.implementation"] == "pallas":
        if s["loss.top_k"]:
            refuse(s, "loss.implementation", "loss.top_k needs chunked or auto")
        if not methods.METHODS[s["method"]].teacher:
            refuse(s, "loss.implementation", f"method={s['method']} needs chunked or auto")


def _check_data_settings(s: Mapping, data: bool) -> None:
    if data and not s["data.path"]:
        refuse(s, "data.path", "name a file of problems, or tfds:NAME/SPLIT")
    written = s["prompt.exemplars"] > 0 or not methods.METHODS[s["method"]].samples
    if written and (s["reward.kind"], s["prompt.answer"]) == ("choice", "none"):
        # If a solution is followed by a bare letter, the grader cannot read the letter as a choice.
        rule = "method=sft and prompt.exemplars write answers; with reward.kind=choice, use choice"
        refuse(s, "prompt.answer", rule)
    english = s["context.problem_en"] or s["context.solution"]
    if s["context.kind"] == "crosslingual" and not english:
        refuse(s, "context.problem_en", "crosslingual needs this or context.solution to be True")
    languages, weights = tuple(s["data.lang"]), s["data.weights"]
    if not languages:
        refuse(s, "data.lang", "name at least one language")
    if weights and len(weights) != len(languages):
        refuse(s, "data.weights", f"give one number for each of data.lang={languages}")
    numbers = all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights)
    if not numbers or (weights and sum(weights) == 0):
        refuse(s, "data.weights", "all weights must be at least 0, and one weight must be above 0")


def _check_train_settings(s: Mapping, completions: int) -> None:
    for name in ("train.micro_batch", "loss.group"):
        if s[name] and completions % s[name]:
            rule = f"train.batch x rollout.per_prompt = {s['train.batch']} x "
            refuse(s, name, f"it must divide {rule}{s['rollout.per_prompt']} = {completions}")
    if s["model.init"] == "pretrained" and s["model.shape"]:
        refuse(s, "model.shape", "it needs model.init=random")
    if len(set(s["lora.targets"])) != len(s["lora.targets"]):
        refuse(s, "lora.targets", "name each target once")
    if s["train.trainable"] == "lora" and not s["lora.targets"]:
        choices = ", ".join(config_lib.choices("lora.targets", None))
        refuse(s, "lora.targets", f"choose some of {choices}")


def _check_processes(s: Mapping) -> None:
    """Checks mesh.coordinator, and the two settings that need mesh.coordinator=host:port."""
    where, explicit = s["mesh.coordinator"], re.fullmatch(r".+:\d+", s["mesh.coordinator"])
    if where not in ("", "auto") and not explicit:
        refuse(s, "mesh.coordinator", "it must be '' (one process), auto, or host:port")
    for name, alone in (("mesh.processes", 1), ("mesh.process", 0)):
        if not explicit and s[name] != alone:
            refuse(s, name, f"it needs host:port as mesh.coordinator, which is {where!r}")
    if not 0 <= s["mesh.process"] < s["mesh.processes"]:
        rule = f"it must be at least 0 and below mesh.processes, which is {s['mesh.processes']}"
        refuse(s, "mesh.process", rule)
