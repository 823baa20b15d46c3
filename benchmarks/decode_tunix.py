"""Runs tunix's sampler for benchmarks/decode.py on the pieces of a work file.

    DIR/bin/python benchmarks/decode_tunix.py work.json

benchmarks/tunix_env.sh creates DIR; copsd_jax is not imported. The script prints a line of JSON
when it is warm. Then it reads numbers of pieces from standard input, and prints a line for each.

This script changes tunix in three ways, so that only the sampling is compared:
  - The models of tunix 0.1.7 always use a RoPE base of 1e6. Here they use the base of their config.
  - tunix's sampler compiles a program for each number of new tokens. Here all batches share one
    program, with a buffer for the longest limit. Sampling stops at the longest limit of the batch.
  - Prompts are given as ids, and texts are not decoded.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

FAMILIES = {"llama": "llama3", "qwen2": "qwen2", "qwen3": "qwen3"}
TIED = {"llama3": "weight_tying", "qwen2": "use_tied_embedding", "qwen3": "use_tied_embedding"}
NO_ID = -1  # the id of padding and of end of text, which no token has


class Ids:
    """A tokenizer for prompts that are already token ids."""

    def encode(self, ids: list[int]) -> list[int]:
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        del ids
        return ""

    def bos_id(self) -> int | None:
        return None

    def eos_id(self) -> int:
        return NO_ID

    def pad_id(self) -> int:
        return NO_ID


def load(folder: str, dtype: str) -> tuple[Any, dict]:
    """Loads a Hugging Face folder with tunix's loader; returns the model and the config."""
    import jax.numpy as jnp

    with open(pathlib.Path(folder) / "config.json", encoding="utf-8") as stream:
        raw = json.load(stream)
    if raw["model_type"] not in FAMILIES or raw.get("rope_scaling"):
        raise ValueError(f"tunix has no {raw['model_type']} model with this config")
    family = FAMILIES[raw["model_type"]]
    models: Any = importlib.import_module(f"tunix.models.{family}.model")
    params: Any = importlib.import_module(f"tunix.models.{family}.params")
    config = models.ModelConfig(
        num_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"], hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"], head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"], rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"], **{TIED[family]: raw["tie_word_embeddings"]},
    )  # fmt: skip
    if hasattr(config, "dtype"):
        config = dataclasses.replace(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    models.apply_rope = functools.partial(models.apply_rope, rope_theta=raw["rope_theta"])
    return params.create_model_from_safe_tensors(folder, config, dtype=jnp.dtype(dtype)), raw


def log_prob_difference(model: Any, prompt: list[int], logps: list[float]) -> float:
    """Returns the largest difference from the given log-probabilities of a prompt's tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    length = len(prompt)
    tokens_1L = jnp.asarray([prompt], jnp.int32)
    mask_1LL = jnp.tril(jnp.ones((1, length, length), bool))
    logits_1LV, _ = model(tokens_1L, jnp.arange(length)[None], None, mask_1LL)
    logp_LV = jax.nn.log_softmax(logits_1LV[0, :-1].astype(jnp.float32))
    mine = np.asarray(logp_LV)[np.arange(length - 1), prompt[1:]]
    return float(np.abs(mine - np.asarray(logps)).max())


class Tunix:
    """tunix's sampler, with one program for all batches of a work file."""

    def __init__(self, work: dict):
        sampler: Any = importlib.import_module("tunix.generate.sampler")
        self.model, raw = load(work["weights"], work["dtype"])
        self.width, self.longest = max(map(len, work["prompts"])), max(work["limits"])
        self.sampler = sampler.Sampler(
            self.model, Ids(),
            sampler.CacheConfig(
                cache_size=self.width + self.longest, num_layers=raw["num_hidden_layers"],
                num_kv_heads=raw["num_key_value_heads"], head_dim=raw["head_dim"],
            ),
        )  # fmt: skip
        self.init, self.limit = self.sampler.init_sample_state, 1
        self.sampler.init_sample_state = self._init

    def _init(self, *args: Any, **options: Any) -> Any:
        """Returns buffers for the longest limit; decoding ends at the limit of this batch.

        tunix's loop runs one step more than needed; the last token that it draws is not stored.
        """
        state = self.init(*args, **options)
        return dataclasses.replace(state, total_sampling_steps=self.width + self.limit - 1)

    def generate(self, prompts: list[list[int]], limit: int, seed: int) -> int:
        """Samples `limit` tokens per prompt; returns the prompt tokens run, including padding."""
        self.limit = limit
        out = self.sampler(
            prompts, max_generation_steps=self.longest, max_prompt_length=self.width,
            eos_tokens=[NO_ID], temperature=1.0, top_p=1.0, seed=seed,
        )  # fmt: skip
        sizes = [len(ids) for ids in out.tokens]
        assert sizes == [limit] * len(prompts), (limit, sizes)
        return len(prompts) * self.width


def check() -> int:
    """Imports tunix's sampler and prints the versions; fails if tunix is not installed."""
    sampler = importlib.import_module("tunix.generate.sampler")
    names = ("google-tunix", "jax", "flax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{sampler.__name__} is there: {versions}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="?", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="only check that tunix is installed")
    args = parser.parse_args()
    if args.check:
        return check()
    work = json.loads(args.work.read_text(encoding="utf-8"))
    prompts, limits = work["prompts"], work["limits"]
    system = Tunix(work)
    difference = log_prob_difference(system.model, prompts[0], work["logps"])
    begun = time.perf_counter()
    for seed in range(2):
        first = [prompts[i] for i in work["pieces"][0][0]]
        system.generate(first, min(work["warm_limit"], system.longest), seed)
    names = ("google-tunix", "jax", "jaxlib", "flax")
    known = {
        "compile_seconds": time.perf_counter() - begun, "logp_difference": difference,
        "cache": work["dtype"], "cache_length": system.width + system.longest,
        "versions": {f"tunix's {name}": importlib.metadata.version(name) for name in names},
    }  # fmt: skip
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        begun, prompt_tokens = time.perf_counter(), 0
        for batch in work["pieces"][int(line)]:
            limit = max(limits[i] for i in batch)
            prompt_tokens += system.generate([prompts[i] for i in batch], limit, work["seed"])
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "prompt_tokens": prompt_tokens}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
