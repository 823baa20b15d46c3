"""How many parameters a plan has, and the memory that it needs."""

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import run_plan


def _bytes(tree: object) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count_parameters(plan: run_plan.Plan) -> dict[str, int]:
    """Numbers of parameters: of the base, and trained."""
    count = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
    base = transformer.abstract_params(plan.model_config, plan.dtype)
    return {
        "base": count(base),
        "trained": count(run_plan.trained_shapes(plan.config, plan.model_config)),
    }


def memory(plan: run_plan.Plan) -> dict[str, int]:
    """Bytes by part, over all devices; activations without what the compiler adds.

    Weights; trained values with gradients, two AdamW moments and the average; the decode cache; the
    inputs of layers kept for the backward pass of a micro-batch (without remat all of a layer's,
    about 20 times its width, of projections 10); the blocks of logits of the loss.
    """
    c, shape = plan.config, plan.model_config
    item = np.dtype(plan.dtype).itemsize
    completions = config_lib.completions_per_step(c)
    micro = c.train.micro_batch or completions
    length = plan.longest["student"] + c.rollout.max_tokens
    rows = micro * length  # tokens of the student's side
    if c.train.micro_tokens:
        rows = min(rows, c.train.micro_tokens * sharding.batch_shards(plan.mesh))
    copies = 4 + (c.teacher.weights == "ema")
    kept = {"none": 20, "dots": 10, "attention": 2, "layer": 1}[c.model.remat]
    entry = shape.head_dim * item
    if c.sampler.cache != "auto":
        scale = 4 if c.sampler.cache == "int8" else 0
        entry = shape.head_dim * jnp.dtype(c.sampler.cache).itemsize + scale
    repeats = sharding.key_repeats(shape.n_heads, shape.n_kv_heads, plan.mesh.shape["tensor"])
    cache = 2 * shape.n_layers * shape.n_kv_heads * repeats * entry
    dense = c.loss.implementation == "dense"
    # A chunk of the loss is of each device's tokens.
    tokens = min(rows, micro * c.rollout.max_tokens)
    if not dense:
        tokens = min(tokens, c.loss.chunk * sharding.batch_shards(plan.mesh))
    return {
        "weights": _bytes(transformer.abstract_params(shape, plan.dtype)),
        "training state": copies * _bytes(run_plan.trained_shapes(plan.config, plan.model_config)),
        "decode cache": cache * c.rollout.slots * length,
        "activations": rows * shape.d_model * shape.n_layers * kept * item,
        "logits": 4 * 4 * tokens * shape.vocab_size,
    }


def describe_undivided(frame: run_plan.ProgramPlan | run_plan.Plan) -> str:
    """Which parameters stay whole along an axis of the mesh that does not divide them, and what
    this costs; '' for none. Trained values count with what `memory` counts of them."""
    c, where, shape = frame.config, frame.mesh, frame.model_config
    base = transformer.abstract_params(shape, frame.dtype)
    names, more = sharding.find_undivided(base, where, shape.n_kv_heads)
    own, extra = sharding.find_undivided(run_plan.trained_shapes(c, shape), where, shape.n_kv_heads)
    if not names and not own:
        return ""
    told = [
        f"along mesh.{axis}={where.shape[axis]} "
        + ", ".join(dict.fromkeys((*names.get(axis, ()), *own.get(axis, ()))))
        for axis in sharding.AXES
        if axis in names or axis in own
    ]
    more += (4 + (c.teacher.weights == "ema")) * extra
    return f"{'; '.join(told)}: {more / 2**20:,.1f} MiB more on each device"
