"""One of several processes that sample together; prints what it got as one JSON line.

Run as: sampler_process.py RANK PROCESSES PORT
"""

import json
import os
import sys

RANK, PROCESSES, PORT = map(int, sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_num_cpu_devices", 4 // PROCESSES)
if PROCESSES > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", num_processes=PROCESSES, process_id=RANK)

import jax.numpy as jnp
import numpy as np

from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import loop, request

CONFIG = transformer.SHAPES["tiny"]
PROMPTS = [(i, 3, i % 5) for i in range(30)] + [(9, 9)] * 6

assert len(jax.devices()) == 4
with jax.default_device(jax.local_devices()[0]):
    whole = jax.device_get(transformer.init_params(CONFIG, jax.random.key(0), jnp.float32))
    keys = jax.device_get(
        request.derive_sampling_keys(
            0, "rollout", 0, [str(i) for i in range(len(PROMPTS))], [0] * 36
        )
    )
devices = sharding.make_mesh(2, 1, 2)
decoder = transformer.Decoder(CONFIG, jnp.float32)
with jax.set_mesh(devices):
    places = sharding.shardings(whole, devices, CONFIG.n_kv_heads)
    params = jax.tree.map(
        lambda x, place: sharding.shard_tree(x, devices, place.spec), whole, places
    )  # fmt: skip
    policy = policy_lib.Policy(params)
    result = loop.generate(
        decoder, policy, PROMPTS, request.Sampling(40, 1.0, 20, 0.95, stop=("ab", "c")),
        keys=keys, settings=request.SamplerSettings(slots=8, steps=4),
        prefix=shared_prefix.encode_prefix_ids(decoder, policy, (4, 5, 6)),
        vocabulary=request.Vocabulary(
            np.ones(CONFIG.vocab_size, bool),
            [bytes([97 + i % 7]) for i in range(CONFIG.vocab_size)],
        ),
        limits=[1 + 7 * i % 40 for i in range(36)],
    )  # fmt: skip
print(json.dumps([[list(c.ids), c.finish, [round(float(x), 4) for x in c.logps]]
                  for c in result.completions]))  # fmt: skip
