"""One decoder for Qwen3 (dense), Qwen2.5, Llama 3 and SmolLM2, which differ only in their config.

The decoder takes a tuple of streams. A stream contains tokens, their positions and their segments.
A stream may also contain an adapter, a shared prefix or a cache. Each layer processes all streams,
so that student and teacher share one pass over the weights. The decoder returns hidden states. The
head is separate (`get_head`, `compute_model_logits`), because losses and the sampler need logits
only at some positions.

Letters in array names: B sequences, L tokens per sequence, S keys per sequence, V vocabulary size,
D width, N query heads, K key heads, M = N/K queries per key head, H head size, J decode slots, P
prefix length. Norms, RoPE, softmax and attention logits are always computed in float32.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from copsd_jax.attention import decode_attention, row_attention, visibility
from copsd_jax.model import lora
from copsd_jax.runtime import sharding

QUERY_BLOCK = 512  # number of queries per block; longer rows attend block by block
PROJECTION = "projection"  # name by which remat policies select the projections' outputs
_policies = jax.checkpoint_policies
# Each remat policy selects the values that a layer keeps for the backward pass. The backward pass
# recomputes all values that are not kept. If the policy is None, all values are kept.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": _policies.save_only_these_names(PROJECTION, visibility.CHECKPOINT_NAME),
    "attention": _policies.save_only_these_names(visibility.CHECKPOINT_NAME),
    "layer": _policies.nothing_saveable,
}

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Constants of Llama 3's RoPE scaling, which lowers low frequencies to allow longer texts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model, as its Hugging Face config states them."""

    family: str  # qwen3, qwen2 (also for Qwen2.5) or llama (also for SmolLM2)
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """Returns the (input, output) width of each projection of a layer."""
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        width, inner = self.d_model, self.d_ff
        return {
            "q": (width, query), "k": (width, key), "v": (width, key), "o": (query, width),
            "gate": (width, inner), "up": (width, inner), "down": (inner, width),
        }  # fmt: skip


def _qwen3(d_model: int, d_ff: int, n_layers: int, n_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3", vocab_size=151_936, d_model=d_model, d_ff=d_ff, n_layers=n_layers,
        n_heads=n_heads, n_kv_heads=8, head_dim=128, rope_theta=1e6, rope_scaling=None,
        rms_eps=1e-6, tie_embeddings=tied, qkv_bias=False, qk_norm=True, max_position=40_960,
    )  # fmt: skip


SHAPES = {
    "tiny": dataclasses.replace(
        _qwen3(64, 128, 2, 4, True),
        vocab_size=512, n_kv_heads=2, head_dim=16, rope_theta=1e4, max_position=4096,
    ),
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3_8b": _qwen3(4096, 12_288, 36, 32, False),
    "qwen3_32b": _qwen3(5120, 25_600, 64, 64, False),
    "smollm2_135m": ModelConfig(
        family="llama", vocab_size=49_152, d_model=576, d_ff=1536, n_layers=30, n_heads=9,
        n_kv_heads=3, head_dim=64, rope_theta=1e5, rope_scaling=None, rms_eps=1e-5,
        tie_embeddings=True, qkv_bias=False, qk_norm=False, max_position=8192,
    ),
}  # fmt: skip


class KV(NamedTuple):
    """The keys (after RoPE) and values of all layers; each array is [layers, B, L, K, H]."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """One batch of rows, with the adapter, prefix and cache that the rows use.

    Without a cache, a token attends to tokens of its own segment and of its parent segment
    (`parents_BL`), up to and including its own index in the row. The docstring of
    attention/visibility.py shows an example. The tokens of segment 0 are padding, and tokens of
    other segments do not see padding. The hidden states of padding are 0, and no gradient flows
    through these hidden states.

    With a cache, a row has one token (L = 1), and B is the number of slots. The token of a slot is
    written at index `position - P` of the slot, and attends to the slot's entries up to and
    including this index.

    With or without a cache, every token sees the whole prefix, whose P keys have the positions
    0 … P - 1.

    Attributes:
      tokens_BL: token ids, int32.
      positions_BL: positions of the tokens, int32; the first token after the prefix has position P.
      segments_BL: segments of the tokens, int32, 0 for padding or a dead slot; None is allowed only
        with a cache.
      adapter: tree in the form that `lora.init_adapter` returns, or None. An `unstacked` decoder
        needs a tuple with one tree per layer.
      adapter_scale: factor by which the adapter's output is multiplied; static.
      prefix: KV [layers, 1, P, K, H] that all rows see, or None; gradients flow through the prefix.
        An `unstacked` decoder needs a tuple with one KV [1, P, K, H] per layer.
      cache: cache of B slots, or None.
      parents_BL: parent segments of the tokens, int32, -1 for tokens without a parent segment; None
        if no token has a parent segment.
    """

    tokens_BL: jax.Array
    positions_BL: jax.Array
    segments_BL: jax.Array | None
    adapter: Any = None
    adapter_scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    prefix: Any = None
    cache: decode_attention.Cache | None = None
    parents_BL: jax.Array | None = None


class Output(NamedTuple):
    """The results of one stream.

    Attributes:
      hidden_BLD: hidden states after the final norm, in the decoder's `dtype`.
      kv: keys and values of the stream's tokens, [layers, B, L, K, H]; None unless `return_kv` was
        set.
      cache: the updated cache; None for a stream without a cache.
    """

    hidden_BLD: jax.Array
    kv: KV | None
    cache: decode_attention.Cache | None = None


def compute_llama3_factors(scaling: RopeScaling, frequency: np.ndarray) -> np.ndarray:
    """Returns the factors, float64 [H/2], by which Llama 3's scaling multiplies the frequencies.

    The factor of a frequency depends on the number of full turns that the frequency's pair of
    dimensions makes over the original context length. If a pair makes more than `high_freq_factor`
    turns, the pair's frequency does not change. If a pair makes fewer than `low_freq_factor` turns,
    the pair's frequency is divided by `factor`. If the number of turns is between `low_freq_factor`
    and `high_freq_factor`, the factor of the frequency is interpolated.

    Args:
      scaling: the constants of the scaling.
      frequency: frequencies in radians per position, float64 [H/2].
    """
    turns = scaling.original_max_position * frequency / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep + (1 - keep) / scaling.factor


def compute_rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the frequency of each pair of dimensions, in radians per position, float32 [H/2].

    Source: RoFormer (arXiv 2104.09864), equation 15.
    """
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        frequency = frequency * compute_llama3_factors(config.rope_scaling, frequency)
    return frequency.astype(np.float32)


def _apply_rope(x_BLNH: jax.Array, angle_BLE: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of each head in float32, as Hugging Face does; E is H/2."""
    cos, sin = jnp.cos(angle_BLE)[:, :, None], jnp.sin(angle_BLE)[:, :, None]
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend_cache(
    q_B1KMH, k_B1KH, v_B1KH, cache, inputs: "_StreamInputs", layer, prefix, implementation: str
) -> tuple[jax.Array, decode_attention.Cache]:
    """Computes attention from each slot's token to the prefix, to earlier entries and to itself."""
    q_JKMH, dtype = q_B1KMH[:, 0], q_B1KMH.dtype
    assert inputs.index_B is not None  # A stream with a cache always has index_B.
    own, cache = decode_attention.write_and_attend(
        q_JKMH, k_B1KH[:, 0], v_B1KH[:, 0], cache, layer, inputs.index_B, implementation
    )
    out_JKMH, top_JKM, total_JKM = own
    if prefix is not None:
        shared = _product("jkmh,pkh->jkmp", q_JKMH, prefix.k[0])
        top_JKM = jnp.maximum(own.top_JKM, shared.max(axis=-1))
        shared = jnp.exp(shared - top_JKM[..., None])
        scale_JKM = jnp.exp(own.top_JKM - top_JKM)
        total_JKM = own.total_JKM * scale_JKM + shared.sum(axis=-1)
        shared = _product("jkmp,pkh->jkmh", shared.astype(dtype), prefix.v[0])
        out_JKMH = own.out_JKMH * scale_JKM[..., None] + shared
    # A dead slot without a prefix sees no key, so the total is 0; a lower bound prevents 0 / 0.
    total_JKM = jnp.maximum(total_JKM, jnp.float32(1e-30))
    return (out_JKMH / total_JKM[..., None])[:, None].astype(dtype), cache


class Norm(nn.Module):
    """RMSNorm over the last axis, in float32; the result is cast to `dtype`.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., D], which may have any float type; returns [..., D] in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(self.eps))
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * scale).astype(self.dtype)


class _StreamInputs(NamedTuple):
    """Inputs of a stream that are the same in all layers."""

    angle_BLE: jax.Array  # float32 RoPE angles, E = H/2
    segments_BL: jax.Array | None = None
    parents_BL: jax.Array | None = None
    index_B: jax.Array | None = None  # cache index that the token is written to; -1 for a dead slot


class Layer(nn.Module):
    """One decoder layer, which processes all streams; the body of the scan over layers.

    Attributes:
      config: config of the model.
      dtype: dtype of all products and of the hidden states.
      block: number of queries per block of row attention.
      decode: name of the implementation of decode attention.
      attention: name of the implementation of row attention.
      scales: factor of each stream's adapter.
      return_kv: whether the keys and values of the streams are returned.
      key_repeats: how many times each key head is repeated.
    """

    config: ModelConfig
    dtype: Any
    block: int
    decode: str
    attention: str
    scales: tuple[float, ...]
    return_kv: bool
    key_repeats: int

    def setup(self):
        """Creates the projections and norms."""
        c = self.config
        for name, (_, out) in c.projections().items():
            bias = c.qkv_bias and name in ("q", "k", "v")
            setattr(self, name, lora.Projection(out, bias, self.dtype))
        norms = ("attn_norm", "mlp_norm") + (("q_norm", "k_norm") if c.qk_norm else ())
        for name in norms:
            setattr(self, name, Norm(c.rms_eps, self.dtype))

    def __call__(self, carry, scanned, inputs: tuple[_StreamInputs, ...]):
        """Runs all streams through the layer.

        Args:
          carry: (hidden_BLD, cache or None) of each stream.
          scanned: (layer, slices); `layer` is the layer's index, and `slices` contains the layer's
            (adapter, prefix) for each stream.
          inputs: inputs of each stream.

        Returns:
          The new carry, and one KV [B, L, K, H] or None for each stream.
        """
        layer, slices = scanned
        streams = zip(carry, slices, inputs, self.scales, strict=True)
        results = [self._run_stream(*stream, layer) for stream in streams]
        return tuple(state for state, _ in results), tuple(kv for _, kv in results)

    def _run_stream(self, state, slices, inputs: _StreamInputs, scale: float, layer):
        hidden, cache = state
        adapter, prefix = slices

        def project(name, x):
            leaf = adapter[name] if adapter is not None and name in adapter else None
            return checkpoint_name(getattr(self, name)(x, leaf, scale), PROJECTION)

        q_BLKMH, k, v = self._qkv(project, self.attn_norm(hidden), inputs.angle_BLE)
        if cache is None:
            shared = None if prefix is None else visibility.Prefix(prefix.k[0], prefix.v[0])
            assert inputs.segments_BL is not None  # A stream without a cache has segments.
            seen = visibility.Visibility(inputs.segments_BL, inputs.parents_BL)
            rows = visibility.RowInputs(q_BLKMH, k, v, seen, shared)
            out = row_attention.attend(rows, self.attention, self.block)
        else:
            out, cache = _attend_cache(q_BLKMH, k, v, cache, inputs, layer, prefix, self.decode)
        hidden = hidden + project("o", out.reshape(*out.shape[:2], -1))
        x = self.mlp_norm(hidden)
        hidden = hidden + project("down", nn.silu(project("gate", x)) * project("up", x))
        own = KV(k, v) if self.return_kv and cache is None else None
        return (sharding.constrain_rows(hidden), cache), own

    def _qkv(self, project, x, angle_BLE):
        c = self.config
        q, k, v = (
            project(name, x).reshape(*x.shape[:2], heads, c.head_dim)
            for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads))
        )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = _apply_rope(q.astype(jnp.float32), angle_BLE) * jnp.float32(c.head_dim**-0.5)
        k = _apply_rope(k.astype(jnp.float32), angle_BLE)
        k = k.astype(self.dtype)
        # From here on, there are K · r key heads with M / r queries each; r is key_repeats.
        if self.key_repeats > 1:
            repeat = lambda x: jnp.repeat(x, self.key_repeats, axis=2)  # noqa: E731
            k, v = (sharding.constrain_heads(repeat(x)) for x in (k, v))
        q = q.reshape(*x.shape[:2], k.shape[2], -1, c.head_dim)
        return q.astype(self.dtype), k, v


class _Matrix(nn.Module):
    """One [V, D] matrix: the embedding, or an untied head."""

    field: str
    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.field, nn.initializers.normal(0.02), self.shape, self.dtype)


class Decoder(nn.Module):
    """The model without its head.

    Attributes:
      config: config of the model.
      dtype: dtype of all products and of the hidden states; weights are cast to this dtype when
        they are used.
      remat: a key of REMAT; it selects the values that a layer keeps for the backward pass.
      query_block: number of queries per block in portable attention; longer rows attend block by
        block.
      decode: implementation of attention for streams with a cache, a key of
        decode_attention.IMPLEMENTATIONS.
      attention: implementation of attention for streams without a cache, one of
        row_attention.IMPLEMENTATIONS.
      key_repeats: how many times attention and caches repeat each key head
        (`sharding.count_sharded_key_repeats`).
      unstacked: whether to run the layers one by one instead of scanning stacked arrays; only for
        streams with a cache. If `unstacked` is set, the parameter tree has the keys `layer_0`,
        `layer_1`, … instead of `layers`, and adapters and prefixes are tuples with one tree per
        layer. Unstacked arrays avoid copies: XLA on CPU copies each slice of a stacked array before
        it reads the slice.
    """

    config: ModelConfig
    dtype: Any
    remat: str = "none"
    query_block: int = QUERY_BLOCK
    decode: str = "blocks"
    attention: str = "portable"
    key_repeats: int = 1
    unstacked: bool = False

    @property
    def key_heads(self) -> int:
        """Number of key heads, K, in prefixes and caches."""
        return self.config.n_kv_heads * self.key_repeats

    @nn.compact
    def __call__(self, streams: tuple[Stream, ...], return_kv: bool = False) -> tuple[Output, ...]:
        """Runs all streams through the model.

        Args:
          streams: batches of rows.
          return_kv: whether to return keys and values of streams without a cache.

        Returns:
          The output of each stream.

        Raises:
          ValueError: `remat` is unknown; a stream without a cache has no segments; an `unstacked`
            decoder gets a stream without a cache; or a stream with a cache has rows of more than
            one token.
        """
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"model.remat is {self.remat!r}: the choices are {', '.join(REMAT)}")
        if self.unstacked and any(s.cache is None for s in streams):
            raise ValueError("unstacked is True: every stream must have a cache")
        embedding = _Matrix("embedding", (c.vocab_size, c.d_model), self.dtype, name="embed")()
        if not c.tie_embeddings:
            _Matrix("kernel", (c.vocab_size, c.d_model), self.dtype, name="head")()
        layers = (
            c, self.dtype, self.query_block, self.decode, self.attention,
            tuple(s.adapter_scale for s in streams), return_kv, self.key_repeats,
        )  # fmt: skip
        look_up = sharding.look_up
        embed = lambda s: sharding.constrain_rows(  # noqa: E731
            (look_up(embedding, s.tokens_BL) if s.cache is None else embedding[s.tokens_BL])
            .astype(self.dtype)
        )  # fmt: skip
        carry = tuple((embed(s), s.cache) for s in streams)
        slices = tuple((s.adapter, s.prefix) for s in streams)
        run = self._run_unstacked if self.unstacked else self._run_scan
        carry, kvs = run(layers, carry, slices, tuple(_prepare_inputs(c, s) for s in streams))
        norm = Norm(c.rms_eps, self.dtype, name="final_norm")
        return tuple(
            Output(_zero_padding(norm(hidden), stream.segments_BL), kv, cache)
            for (hidden, cache), kv, stream in zip(carry, kvs, streams, strict=True)
        )

    def _run_scan(self, layers: tuple, carry, slices, inputs):
        """Runs the layers as a scan; returns the carry, and the stacked keys and values.

        Args:
          layers: arguments of Layer.
          carry: the carry of `Layer.__call__`.
          slices: (adapter, prefix) of each stream; the arrays of adapters and prefixes have a
            leading axis of layers.
          inputs: inputs of each stream.
        """
        policy = REMAT[self.remat]
        body = Layer if policy is None else nn.remat(Layer, prevent_cse=False, policy=policy)
        axes: Any = (0, nn.broadcast)
        count = self.config.n_layers
        scan = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=axes, length=count,
        )  # fmt: skip
        index = jnp.arange(count, dtype=jnp.int32)
        return scan(*layers, name="layers")(carry, (index, slices), inputs)

    def _run_unstacked(self, layers: tuple, carry, slices, inputs):
        """Runs the layers one by one; arguments and results are those of `_run_scan`."""
        for i in range(self.config.n_layers):
            own = tuple(tuple(None if x is None else x[i] for x in both) for both in slices)
            carry, kvs = Layer(*layers, name=f"layer_{i}")(carry, (jnp.int32(i), own), inputs)
        return carry, kvs


def _prepare_inputs(config: ModelConfig, stream: Stream) -> _StreamInputs:
    """Computes RoPE angles and cache indices, and checks that the stream is complete."""
    frequency = jnp.asarray(compute_rope_frequencies(config))
    angle = stream.positions_BL.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    if stream.cache is None:
        if stream.segments_BL is None:
            raise ValueError("segments_BL is None: a stream without a cache needs segments_BL")
        return _StreamInputs(angle, stream.segments_BL, stream.parents_BL)
    if stream.tokens_BL.shape[1] != 1:
        raise ValueError(
            f"tokens have shape {stream.tokens_BL.shape}: with a cache, a row must have one token"
        )
    offset = 0
    if stream.prefix is not None:
        first = stream.prefix if isinstance(stream.prefix, KV) else stream.prefix[0]
        offset = first.k.shape[-3]
    index_B = stream.positions_BL[:, 0] - jnp.int32(offset)
    if stream.segments_BL is not None:
        index_B = jnp.where(stream.segments_BL[:, 0] > 0, index_B, jnp.int32(-1))
    return _StreamInputs(angle, index_B=index_B)


def _zero_padding(hidden_BLD: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Sets the hidden states of padding to 0, so that no gradient flows through them."""
    if segments_BL is None:
        return hidden_BLD
    return jnp.where((segments_BL > 0)[:, :, None], hidden_BLD, jnp.zeros((), hidden_BLD.dtype))


def get_head(params: dict) -> jax.Array:
    """Returns the output matrix [V, D]; for a model with tied embeddings, this is the embedding."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"]


def compute_model_logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Computes the logits, float32 [..., V], of hidden states [..., D].

    For the products, the head is cast to the dtype of the hidden states; sums are in float32.
    """
    return jnp.einsum(
        "...d,vd->...v", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _init_params(config: ModelConfig, dtype: Any, key: jax.Array) -> dict:
    one = jnp.zeros((1, 1), jnp.int32)
    variables: Any = Decoder(config, dtype).init(key, (Stream(one, one, one),))
    return variables["params"]


def init_params(config: ModelConfig, key: jax.Array, dtype: Any) -> dict:
    """Creates random parameters: matrices from N(0, 0.02²), norm scales 1, and biases 0."""
    return jax.jit(functools.partial(_init_params, config, dtype))(key)


@functools.lru_cache(maxsize=8)  # Without the cache, each call would trace the model again.
def abstract_params(config: ModelConfig, dtype: Any) -> dict:
    """Returns the tree of `init_params` as jax.ShapeDtypeStructs, without allocating memory.

    The tree is cached and shared: callers must not change it.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(functools.partial(_init_params, config, dtype), key)
