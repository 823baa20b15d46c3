"""Attention of rows compiled for a TPU pod, without one: memory and traffic of each form.

What compiles is the gradient of one layer's attention at Qwen3-1.7B's and SmolLM2's heads, and a
student's and teacher's pass with its gradient: of a tiny model in the tests, of Qwen3-1.7B by hand
(minutes). Variables of the environment have to be set before jax is imported, so this file runs
itself as a program: `python FILE few|all`.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import without_devices
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import row_attention, visibility
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding

LENGTH, PREFIX = 4096, 300
CASES = {  # form, K, M, H, L, parents and prefix, ways over key heads
    "splash": ("splash", 8, 2, 128, LENGTH, False, 1),
    "tensor": ("splash", 8, 2, 128, LENGTH, False, 2),
    "parents": ("splash", 8, 2, 128, LENGTH, True, 1),
    "smollm2": ("splash", 3, 3, 64, 352, False, 1),
    "smollm2 parents": ("splash", 3, 3, 64, 352, True, 1),
    "tiny": ("splash", 2, 2, 16, 40, False, 1),
}


# --- the program of its own -------------------------------------------------------------------


def facts(program: Any) -> dict:
    text, memory, costs = program.as_text(), program.memory_analysis(), program.cost_analysis()
    return {
        "temporary": memory.temp_size_in_bytes,
        "kernels": text.count("tpu_custom_call"),
        "bytes": costs.get("bytes accessed"),
        "seconds": costs.get("optimal_seconds"),
        "matmuls": hlo.matmuls(text, 1),
    }


def attention(devices, form, K, M, H, L, parents, ways) -> dict:
    """Gradient of one row per device (per pair of devices with 2 ways)."""
    where = sharding.make_mesh(1, len(devices) // ways, ways, devices)
    rows = len(devices) // ways

    def array(shape, dtype, *axes):
        place = NamedSharding(where, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q = array((rows, L, K, M, H), "bfloat16", sharding.BATCH_AXES, None, "tensor")
    k = array((rows, L, K, H), "bfloat16", sharding.BATCH_AXES, None, "tensor")
    ids = array((rows, L), "int32", sharding.BATCH_AXES)
    shared: Any = array((PREFIX, K, H), "bfloat16", None, "tensor")

    def gradient(q, k, v, ids, parents, prefix, g):
        seen = visibility.Visibility(ids, parents)
        attend = lambda q, k, v: row_attention.attend(  # noqa: E731
            visibility.RowInputs(q, k, v, seen, prefix), form, 512
        )
        return jax.vjp(attend, q, k, v)[1](g)

    extra = (ids, visibility.Prefix(shared, shared)) if parents else (None, None)
    with jax.set_mesh(where):
        return facts(jax.jit(gradient).lower(q, k, k, ids, *extra, q).compile())


def passes(devices, shape: str, length: int, form: str, remat: str) -> dict:
    """A student's and a teacher's pass, gradient to an adapter; one row of each a device."""
    config = transformer.SHAPES[shape]
    where = sharding.make_mesh(1, len(devices), 1, devices)
    bf16 = jnp.bfloat16
    trees = (
        transformer.abstract_params(config, bf16),
        jax.eval_shape(lambda: lora.init_adapter(config, 16, lora.TARGETS, jax.random.key(0))),
    )
    params, adapter = (sharding.to_abstract(t, where, sharding.shardings(t, where)) for t in trees)
    one = np.zeros((len(devices), length), np.int32)
    ids = sharding.to_abstract(one, where, PartitionSpec(sharding.BATCH_AXES))
    apply: Any = transformer.Decoder(config, bf16, remat, attention=form).apply

    def loss(adapter, params, ids):
        teacher = transformer.Stream(ids, ids, ids)
        streams = (dataclasses.replace(teacher, adapter=adapter), teacher)
        student, teacher = apply({"params": params}, streams)
        product = student.hidden_BLD * jax.lax.stop_gradient(teacher.hidden_BLD)
        return product.astype(jnp.float32).sum()

    with jax.set_mesh(where):
        return facts(jax.jit(jax.grad(loss)).lower(adapter, params, ids).compile())


def main(wanted: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    found = {name: attention(devices, *case) for name, case in CASES.items()}
    found["layer"] = passes(devices, "tiny", 1024, "splash", "layer")
    if wanted == "all":
        for form in ("splash", "portable"):
            found[form] = attention(devices, form, 8, 2, 128, LENGTH, False, 1)
            found[f"{form} pass"] = passes(devices, "qwen3_1_7b", LENGTH, form, "layer")
    print(json.dumps(found))


# --- tests ------------------------------------------------------------------------------------


@functools.cache
def compiled() -> dict[str, dict]:
    if importlib.util.find_spec("libtpu") is None:
        hlo.missing("libtpu, which compiles for TPUs")
    return without_devices.results_of_program(__file__, "few", 280)


def test_splash_holds_no_logits():
    found = compiled()
    row = 16 * LENGTH * 128 * 2  # queries of a row in bytes
    assert found["splash"]["temporary"] < 4 * row
    assert {found[name]["kernels"] for name in CASES} == {3}


def test_the_teachers_kernel_is_not_run_backwards():
    """Forward of both; of the student again, and its two gradients."""
    assert compiled()["layer"]["kernels"] == 5


if __name__ == "__main__":
    main(sys.argv[1])
