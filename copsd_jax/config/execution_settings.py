"""The settings that decide where and how a run computes: sampler engine, mesh, compilation."""

from copsd_jax.config.declaration import (
    Setting,
    declare,
    entry_of,
    goes_with,
    one_of,
    server,
    whole,
)

LOCAL = goes_with("sampler.engine", "local")
SERVER = goes_with("sampler.engine", "server")
LORA = goes_with("train.trainable", "lora")

SAMPLER: dict[str, Setting] = {
    "sampler.engine": declare("local", "where completions are drawn: in this process, or by a "
        "server that accepts token ids", one_of("local", "server")),
    "sampler.steps": declare(16, "tokens per slot in each call of decode", whole(1, 100_000),
        LOCAL),
    "sampler.pack": declare(512, "tokens per row of a prefill; a longer prompt gets its own row",
        whole(1, 16_777_216), LOCAL),
    "sampler.cache": declare("auto", "dtype of keys and values; auto: dtype of the model",
        one_of("auto", "float32", "bfloat16", "int8"), LOCAL),
    "sampler.attention": declare("auto", "attention to the cache; auto: blocks on CPU, otherwise "
        "pallas", one_of("auto", "blocks", "dense", "pallas"), LOCAL),
    "sampler.merge": declare(False, "add the adapter to a copy of the base, once per phase",
        None, LORA, LOCAL),
    "sampler.int8": declare(False, "round projections to int8 for decoding", None, LOCAL),
    "sampler.gather": declare(True, "gather the weights that mesh.fsdp splits: once per phase "
        "(True), or once per token (False)", None, LOCAL),
    "sampler.warmup": declare("auto", "compile all programs before the first step; auto: on GPU "
        "and TPU", one_of("auto", "always", "never"), LOCAL),
    **server("sampler", timeout=600.0, concurrency=64, read_when=SERVER),
    "sampler.dialect": declare("vllm", "the API of the server",
        entry_of("servers/dialects.py DIALECTS"), SERVER),
    "sampler.logprobs": declare("raw", "distribution of the server's log-probabilities",
        entry_of("servers/remote_engine.py LOGPROBS"), SERVER),
    "sampler.max_model_len": declare(0, "maximum tokens of prompt and completion; 0: ask "
        "the server", whole(0), SERVER),
    "sampler.folder": declare("", "folder with weights for the server; the server must be able "
        "to read the folder; '' for W/engine", None, SERVER),
}  # fmt: skip

MESH: dict[str, Setting] = {
    "mesh.data": declare(-1, "devices of this axis; -1 for all remaining devices"),
    "mesh.fsdp": declare(1, "devices of this axis, which splits completions and parameters"),
    "mesh.tensor": declare(1, "devices of this axis, which splits heads, MLP and vocabulary; "
        "must divide the number of query heads"),
    "mesh.coordinator": declare("", "host:port of the first of several processes; auto on a "
        "cluster that JAX detects; '' for one process"),
    "mesh.processes": declare(1, "number of processes, if coordinator is host:port", whole(1)),
    "mesh.process": declare(0, "number of this process, if coordinator is host:port"),
    "mesh.heartbeat": declare(20, "seconds of silence after which a process counts as dead and all "
        "other processes end", whole(1)),
}  # fmt: skip

LOG: dict[str, Setting] = {
    "log.callback": declare("", "function (step, metrics) that is called after each step, as "
        "module:function; the run stops if it returns True; '' for none"),
}  # fmt: skip

COMPILE: dict[str, Setting] = {
    "compile.cache": declare("auto", "folder that keeps compiled programs for later starts; auto: "
        "in the user's cache folder; '' for none"),
}  # fmt: skip
