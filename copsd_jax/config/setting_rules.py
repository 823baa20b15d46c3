"""What settings are refused before any file, weight or device is looked at.

Every refusal is one sentence with the setting, its value and what would do. A value that nothing
would read is refused too (`READ`): whoever sets it expects something of it.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from copsd_jax.config import settings as config_lib

CHOICES = {
    "method": ("distill", "grpo", "sft"),
    "model.init": ("pretrained", "random"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "attention", "layer"),
    "model.attention": ("auto", "portable", "splash", "cudnn"),
    "data.missing": ("error", "drop"),
    "data.overlong": ("error", "drop"),
    "prompt.template": ("chat", "plain"),
    "prompt.answer": ("boxed", "answer_is", "choice", "none"),
    "prompt.form": ("plain", "step_tags"),
    "prompt.thinking": ("none", "off", "on", "prefix"),
    "teacher.thinking": ("none", "off", "on", "prefix"),
    "eval.thinking": ("none", "off", "on", "prefix"),
    "eval.extract": ("last_after_think", "last_anywhere"),
    "teacher.weights": ("fixed", "ema", "live", "trust_region"),
    "context.kind": (
        "reference",
        "crosslingual",
        "reason_first",
        "reflection",
        "critique",
        "sibling",
        "feedback",
        "other_problem",
        "none",
    ),
    "context.sibling": ("first", "shortest", "sampled"),
    "context.feedback": ("never", "always", "without_sibling"),
    "context.correct": ("distill", "skip"),
    "context.leak": ("keep", "mask", "drop"),
    "author.kind": ("none", "student", "teacher", "grader", "server", "file"),
    "author.thinking": ("as_teacher", "none", "off", "on", "prefix"),
    "tokens.on_failure": ("full", "skip", "step"),
    "tokens.occurrence": ("first", "last"),
    "sampler.engine": ("local", "server"),
    "sampler.dialect": ("vllm", "sglang"),
    "sampler.logprobs": ("raw", "tempered", "processed"),
    "sampler.cache": ("auto", "float32", "bfloat16", "int8"),
    "sampler.attention": ("auto", "blocks", "dense", "pallas"),
    "sampler.warmup": ("auto", "always", "never"),
    "train.trainable": ("lora", "full"),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.pack": ("off", "rows", "shared"),
    "loss.divergence": ("fkl", "rkl", "jsd", "sampled"),
    "loss.clip_mode": ("none", "element", "token", "token_weight", "huber"),
    "loss.top_k_of": ("teacher", "student", "union"),
    "loss.norm": ("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all"),
    "policy.scale": ("std", "none"),
    "policy.old": ("trainer", "sampler"),
    "policy.norm": ("sequence", "token", "constant"),
    "policy.route": ("all", "successes"),
    "loss.implementation": ("auto", "dense", "chunked", "pallas"),
}
# Bounds of whole numbers that arrays or random keys are made from; others end at 2**31 - 1.
LARGEST = {
    "seed": 2**32 - 1,  # larger seeds would repeat smaller ones
    "train.batch": 1_000_000,
    "rollout.per_prompt": 100_000,
    "rollout.slots": 100_000,
    "author.slots": 100_000,
    "author.concurrency": 1_000,
    "eval.slots": 100_000,
    "sampler.steps": 100_000,
    "sampler.pack": 16_777_216,
    "sampler.concurrency": 1_000,
    "eval.samples": 100_000,
    "lora.rank": 16_384,
    "loss.chunk": 16_777_216,
}


def settings(config: config_lib.Config, *, train: bool = True, data: bool = True) -> None:
    """Checks all that can be checked without files, weights or devices.

    Args:
      train: whether something will be trained; a saved run may be evaluated and exported even if
        it has values that nothing read.
      data: whether problems will be read.

    Raises:
      ValueError: in one sentence with the setting, its value and the choices.
    """
    s = config_lib.flat(config)
    for name, choices in CHOICES.items():
        if s[name] not in choices:
            _refuse(name, s[name], f"the choices are {', '.join(choices)}")
    for target in s["lora.targets"]:
        if target not in config_lib.LORA_TARGETS:
            _refuse("lora.targets", target, f"the choices are {', '.join(config_lib.LORA_TARGETS)}")
    if any(not isinstance(text, str) or not text for text in s["rollout.stop"]):
        _refuse("rollout.stop", s["rollout.stop"], "stop strings are texts, and must not be empty")
    _check_ranges(s)
    _check_author(s)
    _check_engine(s)
    _check_tokens(s)
    _check_groups(s)
    _check_policy(s)
    _check_loss(s)
    _check_answers(s)
    if data and not s["data.path"]:
        _refuse("data.path", "", "name a file of problems, or tfds:NAME/SPLIT")
    _check_data(s)
    _check_training(s)
    _check_processes(s)
    if train:
        _check_read(s)


def vocabulary(config: config_lib.Config, vocab_size: int) -> None:
    """top_k settings against the model's vocabulary, once its shape is known.

    Raises:
      ValueError: naming the setting.
    """
    s = config_lib.flat(config)
    for name in ("rollout.top_k", "eval.top_k", "author.top_k", "loss.top_k"):
        if s[name] > vocab_size:
            _refuse(name, s[name], f"the model has {vocab_size} tokens (0 is off)")


def shards(config: config_lib.Config, devices: int) -> None:
    """Completions of a micro-batch against the devices that share them, unless rows are packed.

    Raises:
      ValueError: they do not divide.
    """
    s = config_lib.flat(config)
    completions = s["train.batch"] * s["rollout.per_prompt"]
    micro = s["train.micro_batch"] or completions
    if micro % devices and s["train.pack"] == "off":
        _refuse(
            "train.micro_batch" if s["train.micro_batch"] else "train.batch",
            s["train.micro_batch"] or s["train.batch"],
            f"{micro} completions of a micro-batch do not divide over {devices} devices "
            "(mesh.data x mesh.fsdp)",
        )  # fmt: skip


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{name} is {value!r}: {rule}")


# ------------------------------------------------------------------------------ single numbers


def _check_ranges(s: Mapping) -> None:
    """Single numbers against their ranges."""
    at_least_one = (
        "prompt.max_tokens teacher.max_tokens rollout.per_prompt rollout.max_tokens rollout.slots "
        "loss.chunk train.batch train.save_every lora.rank eval.samples eval.slots "
        "author.max_tokens author.slots author.concurrency sampler.steps sampler.pack "
        "sampler.concurrency mesh.processes mesh.heartbeat"
    ).split()
    at_least_zero = (
        "seed data.limit loss.group prompt.exemplars rollout.temperature rollout.top_k "
        "author.temperature author.top_k author.retries author.backoff context.section_tokens "
        "policy.clip_high policy.dual_clip policy.kl policy.rollout_clip loss.rollout_clip "
        "loss.top_k sampler.retries sampler.backoff sampler.max_model_len "
        "train.steps train.micro_batch train.micro_tokens train.row_tokens train.warmup "
        "train.weight_decay train.max_grad_norm train.keep eval.limit eval.every eval.max_tokens "
        "eval.temperature eval.top_k"
    ).split()
    positive = "train.lr train.eps lora.alpha eval.grade_seconds author.timeout sampler.timeout"
    for name in at_least_one:
        if s[name] < 1:
            _refuse(name, s[name], "it must be at least 1")
    for name in at_least_zero:
        if not (s[name] >= 0 and math.isfinite(s[name])):
            _refuse(name, s[name], "it must be at least 0, and finite")
    for name in positive.split():
        if not (s[name] > 0 and math.isfinite(s[name])):
            _refuse(name, s[name], "it must be a positive number")
    for name, value in s.items():
        largest = LARGEST.get(name) or 2**31 - 1
        if isinstance(value, int) and value > largest:
            _refuse(name, value, f"it must be at most {largest}")
    _check_intervals(s)


def _check_intervals(s: Mapping) -> None:
    for name in ("rollout.top_p", "eval.top_p", "author.top_p", "tokens.fuzzy"):
        if not 0 < s[name] <= 1:
            _refuse(name, s[name], "it must be above 0 and at most 1 (1 is off)")
    below_one = (
        "rollout.min_p eval.min_p author.min_p train.b1 train.b2 teacher.ema_decay policy.clip_low"
    )
    for name in below_one.split():
        if not 0 <= s[name] < 1:
            _refuse(name, s[name], "it must be at least 0 and below 1")
    # Beyond, float32 has no digits left for the other terms.
    for name, least, most in (("loss.temperature", 1e-4, 1e4), ("loss.clip", 1e-9, 1e9)):
        if not least <= s[name] <= most:
            _refuse(name, s[name], f"it must lie between {least:g} and {most:g}")
    for name in ("rollout.temperature", "eval.temperature", "author.temperature"):
        if 0 < s[name] < 1e-4:
            _refuse(name, s[name], "it is 0 (greedy) or at least 0.0001")
    if s["policy.weight"] == 1:
        _refuse("policy.weight", 1, "it is below 1: method=grpo is the policy gradient alone")
    for name in ("teacher.rho", "policy.weight"):
        if not 0 <= s[name] <= 1:
            _refuse(name, s[name], "it must be at least 0 and at most 1")
    if not 1e-6 <= s["loss.beta"] <= 1 - 1e-6:  # nearer the ends float32 has no digits left
        rule = "it must lie between 0.000001 and 0.999999; the ends are fkl, rkl"
        _refuse("loss.beta", s["loss.beta"], rule)
    if 0 < s["policy.dual_clip"] <= 1:
        _refuse("policy.dual_clip", s["policy.dual_clip"], "it must be above 1 (0 is off)")
    if not math.isfinite(s["reward.threshold"]):
        _refuse("reward.threshold", s["reward.threshold"], "it must be finite")


# ------------------------------------------------------------------ settings beside one another

# Who can write what a context asks for; contexts not named here ask for nothing.
WRITERS = {
    "reason_first": ("student", "teacher", "server", "file"),
    "reflection": ("student", "teacher", "grader", "server", "file"),
    "critique": ("student", "teacher", "grader", "server", "file"),
}
LOCATED = ("reflection", "critique")  # contexts whose replies name an error
QUOTED = ("from_error", "error_step")  # choices of tokens.select that look for it


def _context(s: Mapping) -> str:
    """Methods without a teacher have the context none."""
    return s["context.kind"] if s["method"] == "distill" else "none"


def _check_author(s: Mapping) -> None:
    """Who writes: what the context asks for, and only that."""
    author, kind = s["author.kind"], _context(s)
    if author not in WRITERS.get(kind, ("none",)):
        choices = ", ".join(WRITERS.get(kind, ("none",)))
        _refuse("author.kind", author, f"with context.kind={kind} it is one of {choices}")
    for name, needed in (("author.path", "file"), ("author.url", "server")):
        if (author == needed) != bool(s[name]):
            rule = "which needs it" if author == needed else f"it goes with {needed} alone"
            _refuse(name, s[name], f"author.kind is {author}, {rule}")
    if author != "grader":
        return
    if s["reward.kind"] != "answer":
        rule = f"its rule reads final answers, with reward.kind=answer; that is {s['reward.kind']}"
        _refuse("author.kind", author, rule)
    if s["eval.extract"] != "last_after_think":
        # An answer inside a think block that never ends would have no step that states it.
        rule = "its rule reads what follows the thinking, with eval.extract=last_after_think"
        _refuse("author.kind", author, f"{rule}; that is {s['eval.extract']}")


def _check_engine(s: Mapping) -> None:
    """A server holds the base and one adapter, or one set of weights: the student's."""
    if s["sampler.engine"] != "server":
        return
    for name in ("sampler.url", "sampler.model"):
        if not s[name]:
            _refuse(name, s[name], "sampler.engine is server, which needs it")
    weights, kind = s["teacher.weights"], s["train.trainable"]
    held = weights == "live" or (kind == "lora" and weights != "ema")
    if s["author.kind"] == "teacher" and not held:
        rule = (
            f"a server (sampler.engine) holds the student alone, not a teacher with "
            f"teacher.weights={weights} beside train.trainable={kind}; student would do"
        )
        _refuse("author.kind", "teacher", rule)


def _check_tokens(s: Mapping) -> None:
    select, kind = s["tokens.select"], _context(s)
    if select in QUOTED and kind not in LOCATED:
        _refuse("tokens.select", select, f"it goes with context.kind={', '.join(LOCATED)}")
    if select not in ("all", *QUOTED) and not re.fullmatch(r"[\w.]+:\w+", select):
        _refuse(
            "tokens.select", select, f"the choices are all, {', '.join(QUOTED)}, module:function"
        )


def _check_groups(s: Mapping) -> None:
    """What needs several completions of a problem."""
    kind, author = _context(s), s["author.kind"]
    if s["method"] == "sft" and s["rollout.per_prompt"] != 1:
        _refuse("rollout.per_prompt", s["rollout.per_prompt"], "method=sft samples nothing: 1")
    grouped = {
        "method=grpo": s["method"] == "grpo",
        "policy.weight": s["policy.weight"] > 0,
        "context.kind=sibling": kind == "sibling",
        # A failure is diagnosed beside a success of its group.
        f"context.kind=reflection with author.kind={author}": kind == "reflection"
        and author in ("student", "teacher", "server"),
        "context.filter_groups": s["context.filter_groups"] and s["method"] == "distill",
    }
    for why, needs_group in grouped.items():
        if needs_group and s["rollout.per_prompt"] < 2:
            _refuse("rollout.per_prompt", s["rollout.per_prompt"], f"{why} needs at least 2")


def _check_policy(s: Mapping) -> None:
    if s["policy.weight"] and s["method"] != "distill":
        _refuse("policy.weight", s["policy.weight"], f"method is {s['method']}: it mixes distill's")
    if s["policy.route"] != "all" and not s["policy.weight"]:
        _refuse("policy.route", s["policy.route"], "policy.weight is 0: there is nothing to route")
    if s["policy.norm"] == "constant" and s["method"] == "sft":
        _refuse("policy.norm", "constant", "method=sft takes sequence, token")
    if s["policy.rollout_clip"] and s["policy.old"] == "sampler":
        rule = "policy.old=sampler has the sampler's probabilities in its ratio already: 0"
        _refuse("policy.rollout_clip", s["policy.rollout_clip"], rule)


def _check_loss(s: Mapping) -> None:
    if s["loss.divergence"] == "sampled" and s["loss.clip_mode"] != "none":
        _refuse("loss.clip_mode", s["loss.clip_mode"], "the sampled divergence takes only none")
    if s["loss.divergence"] == "sampled" and s["loss.top_k"]:
        _refuse("loss.top_k", s["loss.top_k"], "the sampled divergence takes only 0")
    if s["loss.top_k"] == 1 and not s["loss.tail"] and s["loss.top_k_of"] != "union":
        _refuse("loss.top_k", 1, "one entry renormalised is always 1: take 2, or loss.tail=True")
    if s["loss.tail"] and not s["loss.top_k"]:
        _refuse("loss.tail", True, "loss.top_k is 0: all tokens are counted, there is no tail")
    kind = s["loss.implementation"]
    if kind == "pallas" and s["loss.top_k"]:
        _refuse("loss.implementation", kind, "loss.top_k needs chunked or auto")
    if kind == "pallas" and s["method"] != "distill":
        _refuse("loss.implementation", kind, f"method={s['method']} needs chunked or auto")


def _check_processes(s: Mapping) -> None:
    """mesh.coordinator, and the two settings that go with host:port alone."""
    where, explicit = s["mesh.coordinator"], re.fullmatch(r".+:\d+", s["mesh.coordinator"])
    if where not in ("", "auto") and not explicit:
        _refuse("mesh.coordinator", where, "it is '' for one process, auto, or host:port")
    for name, alone in (("mesh.processes", 1), ("mesh.process", 0)):
        if not explicit and s[name] != alone:
            _refuse(name, s[name], f"mesh.coordinator is {where!r}: it goes with host:port alone")
    if not 0 <= s["mesh.process"] < s["mesh.processes"]:
        rule = f"processes count from 0, and mesh.processes is {s['mesh.processes']}"
        _refuse("mesh.process", s["mesh.process"], rule)


# How the answers of each reward.kind can be asked for; a function's, in any way.
ASKED = {"answer": ("boxed", "answer_is"), "choice": ("choice", "none"), "tool_call": ("none",)}


def _check_answers(s: Mapping) -> None:
    """What is asked for is what the reward reads."""
    kind, form = s["reward.kind"], s["prompt.answer"]
    choices = ASKED.get(kind, CHOICES["prompt.answer"])
    if form not in choices:
        rule = f"with reward.kind={kind} it is one of {', '.join(choices)}"
        _refuse("prompt.answer", form, rule)
    worked = s["prompt.exemplars"] > 0 or s["method"] == "sft"
    if (kind, form) == ("choice", "none") and worked:
        # The bare letter behind a solution is no answer that a choice is read from.
        rule = "method=sft and prompt.exemplars write answers: with reward.kind=choice as choice"
        _refuse("prompt.answer", form, rule)


def _check_data(s: Mapping) -> None:
    english = s["context.problem_en"] or s["context.solution"]
    if s["context.kind"] == "crosslingual" and not english:
        _refuse("context.problem_en", False, "crosslingual needs it or context.solution")
    if not s["data.lang"]:
        _refuse("data.lang", s["data.lang"], "name at least one language")
    if s["data.weights"]:
        if len(s["data.weights"]) != len(s["data.lang"]):
            _refuse(
                "data.weights", s["data.weights"],
                f"give one number for each of data.lang={tuple(s['data.lang'])}",
            )  # fmt: skip
        numbers = all(isinstance(w, int | float) for w in s["data.weights"])
        fine = numbers and all(w >= 0 and math.isfinite(w) for w in s["data.weights"])
        if not fine or sum(s["data.weights"]) == 0:
            _refuse("data.weights", s["data.weights"], "weights are at least 0, not all 0")


def _check_training(s: Mapping) -> None:
    completions = s["train.batch"] * s["rollout.per_prompt"]
    for name in ("train.micro_batch", "loss.group"):
        if s[name] and completions % s[name]:
            _refuse(
                name, s[name],
                f"it must divide train.batch x rollout.per_prompt = {s['train.batch']} x "
                f"{s['rollout.per_prompt']} = {completions}",
            )  # fmt: skip
    if s["model.init"] == "pretrained" and s["model.shape"]:
        _refuse("model.shape", s["model.shape"], "it goes with model.init=random only")
    if s["train.warmup"] and s["train.warmup"] >= s["train.steps"]:
        _refuse("train.warmup", s["train.warmup"], f"train.steps is {s['train.steps']}: fewer")
    targets = s["lora.targets"]
    if len(set(targets)) != len(targets):
        _refuse("lora.targets", targets, "name each once")
    if s["train.trainable"] == "lora" and not targets:
        _refuse("lora.targets", targets, f"choose some of {', '.join(config_lib.LORA_TARGETS)}")


# --------------------------------------------------------------------------------- what is read


class Read(NamedTuple):
    """Settings that are read under a condition only.

    Attributes:
      names: apart by blanks.
      goes_with: the condition in words.
      holds: the condition, of all settings by name.
    """

    names: str
    goes_with: str
    holds: Callable[[Mapping], bool]


def _one_of(names: str, setting: str, *values: object) -> Read:
    """Settings that go with some values of another one."""
    words = " or ".join(str(value) for value in values)
    return Read(names, f"{setting}={words}", lambda s: s[setting] in values)


def _has_surrogate(s: Mapping) -> bool:
    return s["method"] == "grpo" or s["policy.weight"] > 0


# A condition that names a setting need not repeat what that one needs: it would be refused itself.
READ = (
    _one_of(
        "teacher.weights teacher.thinking teacher.max_tokens context.kind context.correct "
        "tokens.select parity.template_mismatch loss.divergence loss.temperature loss.top_k "
        "loss.rollout_clip loss.clip_mode loss.norm loss.group",
        "method", "distill",
    ),
    _one_of("context.filter_groups", "method", "distill", "grpo"),
    _one_of("context.problem_en context.solution", "context.kind", "crosslingual"),
    _one_of("context.sibling", "context.kind", "sibling", "reflection"),
    Read(
        "context.feedback",
        "context.kind=sibling, or reflection with parity.reflection_fallback",
        lambda s: s["context.kind"] == "sibling" or s["parity.reflection_fallback"],
    ),
    _one_of(
        "context.section_tokens",
        "context.kind", "reason_first", "reflection", "critique", "sibling", "feedback",
    ),
    _one_of(
        "context.leak parity.reflection_tags parity.reflection_fallback",
        "context.kind", "reflection",
    ),
    Read("author.max_tokens", "an author.kind", lambda s: s["author.kind"] != "none"),
    _one_of("author.temperature author.top_p", "author.kind", "student", "teacher", "server"),
    _one_of(
        "author.top_k author.min_p author.slots author.thinking",
        "author.kind", "student", "teacher",
    ),
    _one_of(
        "author.model author.key_env author.timeout author.retries author.backoff "
        "author.concurrency author.cache",
        "author.kind", "server",
    ),
    _one_of("tokens.on_failure tokens.occurrence tokens.fuzzy", "tokens.select", *QUOTED),
    Read("reward.threshold", "reward.kind=module:function", lambda s: ":" in s["reward.kind"]),
    _one_of("eval.extract", "reward.kind", "answer"),
    _one_of("teacher.rho", "teacher.weights", "trust_region"),
    _one_of("teacher.ema_decay", "teacher.weights", "ema"),
    _one_of("loss.beta loss.normalize_beta", "loss.divergence", "jsd"),
    Read("loss.top_k_of", "a loss.top_k", lambda s: s["loss.top_k"] > 0),
    Read("loss.clip", "a loss.clip_mode", lambda s: s["loss.clip_mode"] != "none"),
    _one_of("loss.group", "loss.norm", "micro_token_mean"),
    Read(
        "policy.scale policy.clip_low policy.clip_high policy.dual_clip policy.kl policy.old "
        "policy.rollout_clip",
        "method=grpo or a policy.weight", _has_surrogate,
    ),
    Read(
        "policy.norm", "method=grpo or sft or a policy.weight",
        lambda s: s["method"] == "sft" or _has_surrogate(s),
    ),
    Read(
        "prompt.exemplars_path prompt.exemplars_lang", "prompt.exemplars",
        lambda s: s["prompt.exemplars"] > 0,
    ),
    _one_of("train.micro_tokens train.row_tokens", "train.pack", "rows", "shared"),
    _one_of("train.micro_tokens", "train.micro_batch", 0),
    _one_of("lora.rank lora.alpha lora.targets sampler.merge", "train.trainable", "lora"),
    _one_of(
        "sampler.steps sampler.pack sampler.cache sampler.attention sampler.merge sampler.int8 "
        "sampler.gather sampler.warmup",
        "sampler.engine", "local",
    ),
    _one_of(
        "sampler.url sampler.model sampler.key_env sampler.timeout sampler.retries "
        "sampler.backoff sampler.concurrency sampler.dialect sampler.logprobs "
        "sampler.max_model_len sampler.folder",
        "sampler.engine", "server",
    ),
)  # fmt: skip


def _check_read(s: Mapping) -> None:
    """Values besides the default that nothing would read."""
    default = config_lib.flat(config_lib.default())
    for read in READ:
        for name in read.names.split():
            if s[name] != default[name] and not read.holds(s):
                _refuse(
                    name, s[name],
                    f"nothing reads it, it goes with {read.goes_with} (else it stays at "
                    f"{default[name]!r})",
                )  # fmt: skip
