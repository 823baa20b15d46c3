"""SDPO: self-distillation from a successful sibling.

Paper: arXiv 2601.20802. Each problem has eight rollouts. The teacher is a moving average of the
student. The teacher sees a successful rollout of a group, and scores the tokens of the other
rollouts of this group.

    python -m copsd_jax.main --config=configs/sdpo.py                 # SmolLM2, bundled problems
    python -m copsd_jax.main --config=configs/sdpo.py:qwen3_8b --config.data.path=FILE

Preset     device        hours   published: avg@16, best within 1 h / 5 h
smollm2    2 CPU cores   0.15    none: the embedded default, groups of four
qwen3_8b   4 GPUs        5       chemistry 41.2 -> 73.2/80.9, physics 59.2 -> 66.6/75.6,
                                 biology 30.8 -> 50.6/56.8, material 58.9 -> 72.1/78.4,
                                 tool use 57.5 -> 68.0/68.5
qwen3_4b   8 GPUs        not found  ROSD's SDPO run: 67.02, mean of five domains
tiny       any CPU       seconds none: random weights, shows that everything runs

For the trust-region teacher, set `--config.teacher.weights=trust_region`. The rich-feedback runs
(code, 32 updates per batch) have no preset, because the trainer makes one update per batch of
rollouts.
"""

from copsd_jax import config as config_lib


def _smollm2() -> config_lib.Config:
    """Returns settings for 135M parameters: worked examples in both prompts, groups of four."""
    c = config_lib.default()
    c.description = "SDPO on the bundled English problems"
    c.context.kind = "sibling"
    c.teacher.weights = "ema"
    c.teacher.ema_decay = 0.95
    c.rollout.per_prompt = 4
    c.loss.divergence = "jsd"
    c.loss.top_k = 100
    c.loss.top_k_of = "student"
    c.loss.tail = True
    c.prompt.template = "plain"
    c.prompt.answer = "answer_is"
    c.prompt.exemplars = 4
    c.rollout.temperature = 0.8
    c.rollout.max_tokens = 40
    c.rollout.stop = ("\n",)
    c.rollout.slots = 16
    c.train.steps = 10
    c.train.batch = 4
    c.train.lr = 5e-5  # 3e-4 lowers the score (benchmarks/results/methods.md)
    c.train.warmup = 2
    c.train.save_every = 5
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.eval.slots = 100
    return c


def _tiny() -> config_lib.Config:
    c = config_lib.default()
    c.description = "a random model of two layers, which shows that everything runs"
    c.context.kind = "sibling"
    c.context.feedback = "without_sibling"
    c.teacher.weights = "ema"
    c.teacher.ema_decay = 0.95
    c.rollout.per_prompt = 2
    c.loss.divergence = "jsd"
    c.loss.top_k = 10
    c.loss.top_k_of = "student"
    c.loss.tail = True
    c.model.init = "random"
    c.model.path = "tiny"
    c.model.shape = "tiny"
    c.prompt.thinking = c.teacher.thinking = c.eval.thinking = "off"
    c.rollout.max_tokens = 8
    c.train.steps = 2
    c.train.batch = 4
    c.train.save_every = 1
    c.train.lr = 1e-3
    c.eval.limit = 4
    return c


def _paper(size: str) -> config_lib.Config:
    """Returns the published recipe; a comment marks settings that the paper does not give."""
    c = config_lib.default()
    c.description = "SDPO as published: a moving-average teacher sees a successful sibling"
    c.model.path = f"Qwen/Qwen3-{size}"
    c.model.remat = "layer"  # our choice, to save memory
    c.data.path = ""  # must be given: --config.data.path
    c.prompt.thinking = c.teacher.thinking = c.eval.thinking = "off"
    c.prompt.max_tokens = 2048
    c.teacher.max_tokens = 10_240
    c.rollout.per_prompt = 8
    c.rollout.max_tokens = 8192
    c.rollout.temperature = 1.0
    c.context.kind = "sibling"
    c.teacher.weights = "ema"
    c.teacher.ema_decay = 0.95  # 1 - rho
    c.loss.divergence = "jsd"
    c.loss.top_k = 100
    c.loss.top_k_of = "student"
    c.loss.tail = True
    c.loss.rollout_clip = 2.0
    c.loss.norm = "micro_token_mean"
    # Each sequence has the same weight. A sequence without a sibling counts as 0. In ROSD's SDPO
    # run (4B), each pair of sequences has the same weight.
    c.loss.group = 2 if size == "4B" else 1
    c.train.trainable = "full"
    c.train.steps = 100  # our choice: the papers give hours and epochs, not steps
    c.train.batch = 32
    c.train.micro_batch = 16
    c.train.lr = 1e-5
    c.train.schedule = "constant"
    c.train.warmup = 10
    c.train.weight_decay = 0.01
    c.train.max_grad_norm = 1.0
    c.eval.path = ""  # must be given: --config.eval.path
    c.eval.samples = 16
    c.eval.temperature = 0.6
    c.eval.top_p = 0.95
    return c


PRESETS = {
    "smollm2": _smollm2,
    "tiny": _tiny,
    "qwen3_4b": lambda: _paper("4B"),
    "qwen3_8b": lambda: _paper("8B"),
}


def get_config(preset: str = "") -> config_lib.Config:
    """Returns the settings of a preset, or of `smollm2` if `preset` is empty."""
    return config_lib.preset(PRESETS, preset, "smollm2")()
