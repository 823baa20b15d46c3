"""Names of a model's parameters in this package, in Hugging Face files and in GGUF files.

For example, layer 3 of `layers/q/kernel` is `model.layers.3.self_attn.q_proj.weight` in Hugging
Face files and `blk.3.attn_q.weight` in GGUF files.
"""

TOP: dict[
    tuple[str, ...], tuple[str, str]
] = {  # path in our tree -> (Hugging Face's name, GGUF's name)
    ("embed", "embedding"): ("model.embed_tokens.weight", "token_embd.weight"),
    ("final_norm", "scale"): ("model.norm.weight", "output_norm.weight"),
    ("head", "kernel"): ("lm_head.weight", "output.weight"),
}
BLOCK = {  # our name within a layer -> (Hugging Face's name, GGUF's name)
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
