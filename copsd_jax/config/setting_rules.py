"""The check of a run's settings, before any file, weight or device is looked at.

Every refusal is one sentence with the setting, its value and the values that would do. What one
setting may be is declared with it (`declaration.Setting`); here are the rules between settings.
"""

import math
import re
from collections.abc import Mapping
from typing import NoReturn

from copsd_jax.config import methods
from copsd_jax.config import settings as config_lib
from copsd_jax.config.declaration import LARGEST, Choices, ListedBy, Range


def check(
    config: config_lib.Config,
    tables: config_lib.Tables = None,
    *,
    train: bool = True,
    data: bool = True,
) -> None:
    """Refuses settings that cannot work, as far as they tell without files, weights or devices.

    Args:
      config: all settings.
      tables: the entries of the package's tables, by the setting that chooses one of them. None
        leaves out the rules that depend on them, so that no table has to be imported.
      train: whether something will be trained. A saved run may be evaluated and exported even if
        it has values that nothing read.
      data: whether problems will be read.

    Raises:
      ValueError: in one sentence with the setting, its value and the choices.
    """
    s = config_lib.flat(config)
    for name, setting in config_lib.SETTINGS.items():
        if isinstance(setting.allowed, Choices):
            _check_choice(s, name, setting.allowed, tables)
        else:
            _check_range(s, name, setting.allowed)
    if any(not isinstance(text, str) or not text for text in s["rollout.stop"]):
        refuse(s, "rollout.stop", "stop strings are texts, and must not be empty")
    for rule in (_check_author, _check_server, _check_groups, _check_policy, _check_loss):
        rule(s)
    _check_data(s, data)
    _check_training(s, config_lib.completions_per_step(config))
    _check_processes(s)
    if train:
        _check_read(s, tables)


def check_vocabulary(config: config_lib.Config, vocab_size: int) -> None:
    """Refuses a top_k above the model's vocabulary, once its shape is known.

    Raises:
      ValueError: naming the setting.
    """
    s = config_lib.flat(config)
    for name in ("rollout.top_k", "eval.top_k", "author.top_k", "loss.top_k"):
        if s[name] > vocab_size:
            refuse(s, name, f"the model has {vocab_size} tokens (0 is off)")


def check_shards(config: config_lib.Config, devices: int) -> None:
    """Refuses a micro-batch whose completions do not divide over the devices that share them.

    Packed rows (train.pack) need not divide.

    Raises:
      ValueError: naming the setting.
    """
    s = config_lib.flat(config)
    name = "train.micro_batch" if s["train.micro_batch"] else "train.batch"
    micro = s["train.micro_batch"] or config_lib.completions_per_step(config)
    if micro % devices and s["train.pack"] == "off":
        rule = f"{micro} completions of a micro-batch do not divide over {devices} devices"
        refuse(s, name, f"{rule} (mesh.data x mesh.fsdp)")


def refuse(s: Mapping, name: str, rule: str) -> NoReturn:
    """Raises ValueError with a setting, its value and the rule that it breaks."""
    raise ValueError(f"{name} is {s[name]!r}: {rule}")


# -------------------------------------------------------------------------------- single settings


def _check_choice(s: Mapping, name: str, allowed: Choices, tables: config_lib.Tables) -> None:
    choices = config_lib.choices(name, tables)
    for value in (s[name],) if isinstance(s[name], str) else s[name]:
        known = value in choices or (allowed.function and re.fullmatch(r"[\w.]+:\w+", value))
        if choices and not known:
            shown = ", ".join(choice or "''" for choice in choices)
            raise ValueError(f"{name} is {value!r}: the choices are {shown}")


def _check_range(s: Mapping, name: str, allowed: Range | None) -> None:
    value, largest = s[name], allowed.largest if allowed else LARGEST
    if allowed and not allowed.holds(value):
        refuse(s, name, f"it must be {allowed.words}")
    if isinstance(value, int) and value > largest:
        refuse(s, name, f"it must be at most {largest}")


def _check_read(s: Mapping, tables: config_lib.Tables) -> None:
    """Refuses values besides the default that nothing would read.

    A condition that names a setting need not repeat that one's own conditions.
    """
    for name, setting in config_lib.SETTINGS.items():
        for when in setting.read_when if s[name] != setting.default else ():
            if not isinstance(when, ListedBy):
                holds = when.holds(s)
            else:
                holds = not tables or name in tables[when.setting].get(s[when.setting], ())
            if not holds:
                rule = f"nothing reads it, it goes with {config_lib.spell(name, when, tables)}"
                refuse(s, name, f"{rule} (else it stays at {setting.default!r})")


# ------------------------------------------------------------------------ rules between settings


def _check_author(s: Mapping) -> None:
    author = s["author.kind"]
    for name, needed in (("author.path", "file"), ("author.url", "server")):
        if author == needed and not s[name]:
            refuse(s, name, f"author.kind is {author}, which needs it")
    if author != "grader":
        return
    if s["reward.kind"] != "answer":
        rule = f"its rule reads final answers, with reward.kind=answer; that is {s['reward.kind']}"
        refuse(s, "author.kind", rule)
    if s["eval.extract"] != "last_after_think":
        # An answer inside a think block that never ends would have no step that states it.
        rule = "its rule reads what follows the thinking, with eval.extract=last_after_think"
        refuse(s, "author.kind", f"{rule}; that is {s['eval.extract']}")


def _check_server(s: Mapping) -> None:
    """Refuses a teacher as author that a server cannot hold beside the student.

    A server holds the base and one adapter, or one set of weights.
    """
    if s["sampler.engine"] != "server":
        return
    for name in ("sampler.url", "sampler.model"):
        if not s[name]:
            refuse(s, name, "sampler.engine is server, which needs it")
    weights, trainable = s["teacher.weights"], s["train.trainable"]
    held = weights == "live" or (trainable == "lora" and weights != "ema")
    if s["author.kind"] == "teacher" and not held:
        teacher = f"teacher.weights={weights} beside train.trainable={trainable}"
        rule = f"a server (sampler.engine) holds the student alone, not a teacher with {teacher}"
        refuse(s, "author.kind", f"{rule}; student would do")


def _check_groups(s: Mapping) -> None:
    """Refuses one completion a problem where a method compares several."""
    method = methods.METHODS[s["method"]]
    if not method.samples and s["rollout.per_prompt"] != 1:
        refuse(s, "rollout.per_prompt", f"method={s['method']} samples nothing: 1")
    comparing = {
        f"method={s['method']}": method.policy_gradient,
        "policy.weight": s["policy.weight"] > 0,
        "context.filter_groups": s["context.filter_groups"] and method.teacher,
    }
    for name, compares in comparing.items():
        if compares and s["rollout.per_prompt"] < 2:
            refuse(s, "rollout.per_prompt", f"{name} needs at least 2")


def _check_policy(s: Mapping) -> None:
    method = s["method"]
    if s["policy.weight"] and not methods.METHODS[method].teacher:
        refuse(s, "policy.weight", f"method is {method}, and only a divergence is mixed with it")
    if s["policy.route"] != "all" and not s["policy.weight"]:
        refuse(s, "policy.route", "policy.weight is 0: there is nothing to route")
    if s["policy.norm"] == "constant" and not methods.METHODS[method].samples:
        refuse(s, "policy.norm", f"method={method} takes sequence, token")
    if s["policy.rollout_clip"] and s["policy.old"] == "sampler":
        rule = "policy.old=sampler has the sampler's probabilities in its ratio already: 0"
        refuse(s, "policy.rollout_clip", rule)


def _check_loss(s: Mapping) -> None:
    for name, off in (("loss.clip_mode", "none"), ("loss.top_k", 0)):
        if s["loss.divergence"] == "sampled" and s[name] != off:
            refuse(s, name, f"the sampled divergence takes only {off}")
    if s["loss.top_k"] == 1 and not s["loss.tail"] and s["loss.top_k_of"] != "union":
        refuse(s, "loss.top_k", "one entry renormalised is always 1: take 2, or loss.tail=True")
    if s["loss.tail"] and not s["loss.top_k"]:
        refuse(s, "loss.tail", "loss.top_k is 0: all tokens are counted, there is no tail")
    if s["loss.implementation"] == "pallas":
        if s["loss.top_k"]:
            refuse(s, "loss.implementation", "loss.top_k needs chunked or auto")
        if not methods.METHODS[s["method"]].teacher:
            refuse(s, "loss.implementation", f"method={s['method']} needs chunked or auto")


def _check_data(s: Mapping, data: bool) -> None:
    if data and not s["data.path"]:
        refuse(s, "data.path", "name a file of problems, or tfds:NAME/SPLIT")
    written = s["prompt.exemplars"] > 0 or not methods.METHODS[s["method"]].samples
    if written and (s["reward.kind"], s["prompt.answer"]) == ("choice", "none"):
        # No choice can be read from a bare letter behind a solution.
        rule = "method=sft and prompt.exemplars write answers: with reward.kind=choice as choice"
        refuse(s, "prompt.answer", rule)
    english = s["context.problem_en"] or s["context.solution"]
    if s["context.kind"] == "crosslingual" and not english:
        refuse(s, "context.problem_en", "crosslingual needs it or context.solution")
    languages, weights = tuple(s["data.lang"]), s["data.weights"]
    if not languages:
        refuse(s, "data.lang", "name at least one language")
    if weights and len(weights) != len(languages):
        refuse(s, "data.weights", f"give one number for each of data.lang={languages}")
    numbers = all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights)
    if not numbers or (weights and sum(weights) == 0):
        refuse(s, "data.weights", "weights are at least 0, not all 0")


def _check_training(s: Mapping, completions: int) -> None:
    for name in ("train.micro_batch", "loss.group"):
        if s[name] and completions % s[name]:
            rule = f"train.batch x rollout.per_prompt = {s['train.batch']} x "
            refuse(s, name, f"it must divide {rule}{s['rollout.per_prompt']} = {completions}")
    if s["model.init"] == "pretrained" and s["model.shape"]:
        refuse(s, "model.shape", "it goes with model.init=random only")
    if s["train.warmup"] and s["train.warmup"] >= s["train.steps"]:
        refuse(s, "train.warmup", f"train.steps is {s['train.steps']}: fewer")
    if len(set(s["lora.targets"])) != len(s["lora.targets"]):
        refuse(s, "lora.targets", "name each once")
    if s["train.trainable"] == "lora" and not s["lora.targets"]:
        choices = ", ".join(config_lib.choices("lora.targets", None))
        refuse(s, "lora.targets", f"choose some of {choices}")


def _check_processes(s: Mapping) -> None:
    """Checks mesh.coordinator, and the two settings that go with host:port alone."""
    where, explicit = s["mesh.coordinator"], re.fullmatch(r".+:\d+", s["mesh.coordinator"])
    if where not in ("", "auto") and not explicit:
        refuse(s, "mesh.coordinator", "it is '' for one process, auto, or host:port")
    for name, alone in (("mesh.processes", 1), ("mesh.process", 0)):
        if not explicit and s[name] != alone:
            refuse(s, name, f"mesh.coordinator is {where!r}: it goes with host:port alone")
    if not 0 <= s["mesh.process"] < s["mesh.processes"]:
        rule = f"processes count from 0, and mesh.processes is {s['mesh.processes']}"
        refuse(s, "mesh.process", rule)
