"""Oracle: softmax attention in float64 NumPy, query by query, over the keys that it sees, and its
gradient by the chain rule written out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

from copsd_jax.attention import row_attention, row_attention_splash, visibility
from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import backends

B, L, K, M, H, P = 2, 21, 2, 2, 16, 5
# Padding, segments of one token, and rests whose beginning stands elsewhere in the row.
SEGMENTS = np.array([[1] * 4 + [2] * 6 + [3] * 5 + [4] + [0] * 5, [1] * 9 + [2] * 12], np.int32)
PARENTS = np.array([[-1] * 4 + [1] * 6 + [1] * 5 + [-1] * 6, [-1] * 9 + [1] * 12], np.int32)
ALONE = np.array([[1] * 21, [1] * 13 + [0] * 8], np.int32)
KINDS = {  # segments, parents, prefix
    "segments": (SEGMENTS, None, False),
    "parents": (SEGMENTS, PARENTS, False),
    "prefix": (ALONE, None, True),
    "all": (SEGMENTS, PARENTS, True),
}


def inputs(scale=1.0, dtype=jnp.float32, rows=B, size=H):
    """q, k, v, the prefix's k and v, and the gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = [(rows, L, K, M, size), (rows, L, K, size), (rows, L, K, size), (P, K, size),
              (P, K, size), (rows, L, K, M, size)]  # fmt: skip
    return [jnp.asarray(rng.normal(0, s, shape), dtype)
            for s, shape in zip([scale] + [1] * 5, shapes, strict=True)]  # fmt: skip


def oracle(q, k, v, pk, pv, g, segments, parents, prefix):
    """The output, and gradients to q, k, v and the prefix's k and v."""
    q, k, v, pk, pv, g = (np.asarray(x.astype(jnp.float32), np.float64) for x in
                          (q, k, v, pk, pv, g))  # fmt: skip
    out, (dq, dk, dv, dpk, dpv) = np.zeros(q.shape), (np.zeros(x.shape) for x in (q, k, v, pk, pv))
    for b, i, h, m in np.ndindex(q.shape[:4]):
        mine = segments[b, : i + 1] == segments[b, i]
        if parents is not None:
            mine |= segments[b, : i + 1] == parents[b, i]
        at = np.flatnonzero(mine)
        keys, values = k[b, at, h], v[b, at, h]
        if prefix:
            keys, values = np.concatenate([pk[:, h], keys]), np.concatenate([pv[:, h], values])
        logit = keys @ q[b, i, h, m]
        weight = np.exp(logit - logit.max())
        weight /= weight.sum()
        out[b, i, h, m] = weight @ values
        slope = values @ g[b, i, h, m]
        slope = weight * (slope - weight @ slope)
        dq[b, i, h, m] = slope @ keys
        of_keys = slope[:, None] * q[b, i, h, m]
        of_values = weight[:, None] * g[b, i, h, m]
        if prefix:
            dpk[:, h] += of_keys[:P]
            dpv[:, h] += of_values[:P]
            of_keys, of_values = of_keys[P:], of_values[P:]
        dk[b, at, h] += of_keys
        dv[b, at, h] += of_values
    return out, [dq, dk, dv, dpk, dpv] if prefix else [dq, dk, dv]


def forms(block=5):
    return {
        "portable": functools.partial(row_attention._attend_portable, block),
        "splash": functools.partial(row_attention_splash.attend, interpret=True),
        "cudnn": functools.partial(row_attention.attend_cudnn, implementation="xla"),
    }


def both(form, arrays, segments, parents, prefix):
    """The output and gradients of one form."""
    given: Any = [None if x is None else jnp.asarray(x) for x in (segments, parents)]
    rows = visibility.Visibility(*given)

    @jax.jit
    def run(q, k, v, pk, pv, g):
        given = (q, k, v, visibility.Prefix(pk, pv)) if prefix else (q, k, v)
        attend = lambda q, k, v, p=None: form(  # noqa: E731
            visibility.RowInputs(q, k, v, rows, p)
        )
        out, back = jax.vjp(attend, *given)
        return out, jax.tree.leaves(back(g))

    return run(*arrays)


def close(got, want, tolerance):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        mine = np.asarray(mine.astype(jnp.float32))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("kind", mostly_slow(KINDS, 2))
@pytest.mark.parametrize("name", ["portable", "splash", "cudnn"])
def test_values_and_gradients(name, kind):
    """Blocks of 5 queries, 21 tokens in a block of 128, lengths that are odd."""
    arrays = inputs()
    close(both(forms()[name], arrays, *KINDS[kind]), oracle(*arrays, *KINDS[kind]), 2e-6)


@pytest.mark.parametrize("block", [1, 2, 7, 21, 512])
def test_blocks_and_groups(block):
    """21 ranges would be more than GROUPS: with blocks of 1 and 2 some hold several."""
    assert len(row_attention.split_queries(L, block)) == {1: 7, 2: 6, 7: 3, 21: 1, 512: 1}[block]
    arrays = inputs()
    form = forms(block)["portable"]
    close(both(form, arrays, *KINDS["all"]), oracle(*arrays, *KINDS["all"]), 2e-6)


def test_ranges():
    assert row_attention.split_queries(11, 4) == [(0, 4), (4, 8), (8, 11)]
    assert row_attention.split_queries(20, 2) == [(i, i + 4) for i in range(0, 20, 4)]
    assert row_attention.split_queries(4000, 512) == [(0, 2048), (2048, 4000)]


@pytest.mark.parametrize("name", ["portable", "splash"])
def test_large_logits(name):
    """Logits up to 300, which float32 rounds to 3e-5: so far may weights be off, relatively."""
    arrays = inputs(scale=20.0)
    got = both(forms()[name], arrays, *KINDS["all"])
    close(got, oracle(*arrays, *KINDS["all"]), 1e-4)


@pytest.mark.parametrize("name", ["portable", "splash"])
def test_bfloat16(name):
    arrays = inputs(dtype=jnp.bfloat16)
    out, slopes = both(forms()[name], arrays, *KINDS["all"])
    assert {x.dtype for x in [out, *slopes]} == {jnp.dtype(jnp.bfloat16)}
    close((out, slopes), oracle(*arrays, *KINDS["all"]), 2e-2)


@pytest.mark.long
def test_splash_in_several_blocks(monkeypatch):
    """300 tokens of random segments in 3 blocks, of which some hold nothing that is seen."""
    monkeypatch.setattr(row_attention_splash, "choose_block", lambda length: 128)
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 6, (1, 300)), axis=1).astype(np.int32)
    parents = np.where(segments > 3, segments - 3, -1).astype(np.int32)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    arrays = [normal(1, 300, K, M, 64), normal(1, 300, K, 64), normal(1, 300, K, 64),
              normal(P, K, 64), normal(P, K, 64), normal(1, 300, K, M, 64)]  # fmt: skip
    for kind in ((segments, None, False), (segments, parents, True)):
        want = both(forms(128)["portable"], arrays, *kind)
        close(both(forms()["splash"], arrays, *kind), jax.tree.map(np.asarray, want), 5e-6)


@pytest.mark.parametrize(
    "length, block", [(1, 128), (128, 128), (129, 256), (352, 384), (640, 384), (2048, 512)]
)
def test_block_sizes(length, block):
    assert row_attention_splash.choose_block(length) == block


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes, kind, count",
    mostly_slow(
        [((2, 2, 2), "all", 4), ((2, 2, 2), "segments", 4), ((2, 1, 4), "all", 3)], several=True
    ),
)
def test_on_a_mesh_each_device_has_its_rows_and_heads(sizes, kind, count):
    """What the mesh does not divide (3 rows over 2, 2 heads over 4) is on all of its devices."""
    segments, parents, prefix = KINDS[kind]
    more = lambda x: None if x is None else np.concatenate([x, x])[:count]  # noqa: E731
    kind = (more(segments), more(parents), prefix)
    arrays = inputs(rows=count)
    here: Any = functools.partial(row_attention_splash.attend, interpret=True)
    want = both(here, arrays, *kind)
    data, fsdp, tensor = sizes
    with jax.set_mesh(
        sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    ) as _:
        form = functools.partial(row_attention.attend_on_mesh, here)
        close(both(form, arrays, *kind), jax.tree.map(np.asarray, want), 1e-5)


def config(**values):
    made = config_lib.default()
    for name, value in values.items():
        made.model[name] = value
    return made


@pytest.mark.parametrize(
    "name, platform, said",
    [
        ("auto", "tpu", "splash"), ("auto", "gpu", "portable"), ("auto", "cpu", "portable"),
        ("portable", "tpu", "portable"),
        ("splash", "cpu", "model.attention is 'splash': it runs on tpu, but the mesh is cpu;"),
        ("cudnn", "tpu", "model.attention is 'cudnn': it runs on gpu, but the mesh is tpu;"),
    ],
)  # fmt: skip
def test_which_form_runs(name, platform, said):
    try:
        found = backends.choose_row_attention(
            config(attention=name), platform, jnp.bfloat16, transformer.SHAPES["qwen3_1_7b"]
        )
    except ValueError as error:
        found = str(error)
    assert found == said or (" is " in said and found.startswith(said))


def test_cudnn_is_refused_with_the_reason():
    shape = transformer.SHAPES["qwen3_1_7b"]
    rows = functools.partial(backends.choose_row_attention, config(attention="cudnn"), "gpu")
    with pytest.raises(ValueError, match=r"it needs model\.dtype=bfloat16, but the dtype is"):
        rows(jnp.float32, shape)
    with pytest.raises(ValueError, match=r"the head size must be 8, 16, \.\.\. 128, but it is 12"):
        rows(jnp.bfloat16, dataclasses.replace(shape, head_dim=12))
    with pytest.raises(ValueError, match=r"jax says 'cuDNN is not detected\.'; choose auto or"):
        rows(jnp.bfloat16, shape)


def test_refusal():
    q, k, v = inputs()[:3]
    rows = visibility.Visibility(jnp.asarray(ALONE))
    with pytest.raises(ValueError, match=r"model\.attention is 'fast': the choices are portable"):
        row_attention.attend(visibility.RowInputs(q, k, v, rows), "fast", 8)
