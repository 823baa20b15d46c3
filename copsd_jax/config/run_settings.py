"""The settings of how a run is carried out: sampler, optimizer, evaluation and devices."""

from copsd_jax.config import methods
from copsd_jax.config.declaration import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    ListedBy,
    Setting,
    declare,
    entry_of,
    goes_with,
    one_of,
    server,
    whole,
)  # fmt: skip
from copsd_jax.config.method_settings import THINKING

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

_TEACHER = goes_with("method", *methods.with_trait("teacher"))
_LOCAL = goes_with("sampler.engine", "local")
_SERVER = goes_with("sampler.engine", "server")
_PACKED = goes_with("train.pack", "rows", "shared")
_LORA = goes_with("train.trainable", "lora")
_CONTEXT = ListedBy("context.kind")

SETTINGS: dict[str, dict[str, Setting]] = {
    "sampler": {
        "engine": declare("local", "where completions are drawn: in this process, or by a server "
                          "of completions over token ids", one_of("local", "server")),
        "steps": declare(16, "tokens per slot between two looks of the host", whole(1, 100_000),
                         _LOCAL),
        "pack": declare(512, "prompt tokens of a prefill, if no prompt is longer",
                        whole(1, 16_777_216), _LOCAL),
        "cache": declare("auto", "dtype of keys and values; auto: the model's",
                         one_of("auto", "float32", "bfloat16", "int8"), _LOCAL),
        "attention": declare("auto", "attention to the cache; auto: blocks on CPU, else pallas",
                             one_of("auto", "blocks", "dense", "pallas"), _LOCAL),
        "merge": declare(False, "add the adapter to a copy of the base, once a rollout phase", None,
                         _LORA, _LOCAL),
        "int8": declare(False, "round projections to int8 for decoding", None, _LOCAL),
        "gather": declare(True, "gather weights split by mesh.fsdp once a phase, not every token",
                          None, _LOCAL),
        "warmup": declare("auto", "compile all programs before the first step; auto: on GPU, TPU",
                          one_of("auto", "always", "never"), _LOCAL),
        **server(timeout=600.0, concurrency=64, read_when=_SERVER),
        "dialect": declare("vllm", "how the server is spoken to",
                           entry_of("servers/dialects.py DIALECTS"), _SERVER),
        "logprobs": declare("raw", "what the server's log-probabilities are of",
                            entry_of("servers/remote_engine.py LOGPROBS"), _SERVER),
        "max_model_len": declare(0, "most tokens of prompt and completion; 0: as the server says",
                                 whole(0), _SERVER),
        "folder": declare("", "where weights for the server lie, in its sight too; '' is W/engine",
                          None, _SERVER),
    },
    "train": {
        "steps": declare(100, "optimizer steps; 0 evaluates only", whole(0)),
        "batch": declare(32, "problems per step", whole(1, 1_000_000)),
        "micro_batch": declare(0, "completions per gradient accumulation step; 0 for all at once",
                               whole(0)),
        "micro_tokens": declare(0, "instead of micro_batch: tokens of its rows on each device, "
                                "both sides", whole(0), _PACKED,
                                goes_with("train.micro_batch", 0)),
        "pack": declare("off", "rows: several samples in a row; shared: with a common prompt once",
                        one_of("off", "rows", "shared")),
        "row_tokens": declare(0, "length of a packed row, if no sample is longer; 0: by the "
                              "lengths of the step", whole(0), _PACKED),
        "trainable": declare("lora", "adapters, or every weight (full)", one_of("lora", "full")),
        "lr": declare(5e-6, "peak learning rate", POSITIVE),
        "schedule": declare("linear", "of the rate after warm-up: linear and cosine end at 0",
                            one_of("constant", "linear", "cosine")),
        "warmup": declare(0, "steps of linear warm-up", whole(0)),
        "weight_decay": declare(0.0, "of AdamW", NOT_NEGATIVE),
        "b1": declare(0.9, "of AdamW", BELOW_ONE),
        "b2": declare(0.999, "of AdamW", BELOW_ONE),
        "eps": declare(1e-8, "of AdamW", POSITIVE),
        "max_grad_norm": declare(1.0, "clip of the global norm; 0 is off", NOT_NEGATIVE),
        "save_every": declare(25, "steps between checkpoints; the last is always saved", whole(1)),
        "keep": declare(3, "checkpoints kept; 0 for all", whole(0)),
        "log_rollouts": declare(True, "write W/rollouts/step_NNNNNN.jsonl"),
    },
    "lora": {
        "rank": declare(64, "of every adapter", whole(1, 16_384), _LORA),
        "alpha": declare(128.0, "an adapter's output is scaled by alpha / rank", POSITIVE, _LORA),
        "targets": declare(LORA_TARGETS, "projections with an adapter", one_of(*LORA_TARGETS),
                           _LORA),
    },
    "eval": {
        "path": declare("bundled:held_out", "as data.path; '' for no evaluation"),
        "fields": declare("", "as data.fields, of eval.path"),
        "lang": declare((), "as data.lang; () for data.lang"),
        "limit": declare(0, "read only the first n records of the source; 0 for all", whole(0)),
        "every": declare(0, "steps between evaluations, besides those before and after", whole(0)),
        "samples": declare(1, "completions per problem (n)", whole(1, 100_000)),
        "max_tokens": declare(0, "longest completion; 0 for rollout.max_tokens", whole(0)),
        "temperature": declare(0.0, "0 is greedy", TEMPERATURE),
        "top_p": declare(1.0, "nucleus sampling", SHARE),
        "top_k": declare(0, "0 is off", whole(0)),
        "min_p": declare(0.0, "0 is off", BELOW_ONE),
        "slots": declare(64, "completions decoded at once", whole(1, 100_000)),
        "thinking": declare("none", "as prompt.thinking, for evaluation", one_of(*THINKING)),
        "extract": declare("last_after_think", "which answer counts: the last one behind the "
                           "thinking, or the last one anywhere",
                           one_of("last_after_think", "last_anywhere"), ListedBy("reward.kind")),
        "grade_seconds": declare(5.0, "time limit of one comparison of answers", POSITIVE),
    },
    "parity": {
        "template_mismatch": declare(False, "let student and teacher start in different states of "
                                     "the template", None, _TEACHER),
        "reflection_tags": declare(False, "read reflections as ROSD does: lazily, a misspelt tag "
                                   "first", None, _CONTEXT),
        "reflection_fallback": declare(False, "as ROSD: without a reflection, show the sibling's "
                                       "solution", None, _CONTEXT),
    },
    "mesh": {
        "data": declare(-1, "devices of this axis; -1 takes the rest"),
        "fsdp": declare(1, "devices of this axis, which splits parameters too"),
        "tensor": declare(1, "devices of this axis, which splits heads, MLP and vocabulary; it "
                          "must divide the model's query heads"),
        "coordinator": declare("", "of several processes: host:port of the first, or auto on a "
                               "known cluster"),
        "processes": declare(1, "how many processes there are, with host:port", whole(1)),
        "process": declare(0, "which of them this one is, with host:port"),
        "heartbeat": declare(20, "seconds of silence after which a process counts as dead and the "
                             "others end", whole(1)),
    },
}  # fmt: skip
