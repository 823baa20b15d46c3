"""GRPO: the reinforcement learning baseline, with the same prompts, rollouts and grader.

Paper: arXiv 2402.03300. The presets follow the GRPO runs in the papers of OPSD and ROSD.

    python -m copsd_jax.main --config=configs/grpo.py                 # SmolLM2, bundled problems
    python -m copsd_jax.main --config=configs/grpo.py:qwen3_4b --config.data.path=FILE

Preset          device        hours      published
smollm2         2 CPU cores   0.15       none: the embedded default, groups of four
qwen3_4b        8 GPUs        not found  OPSD's GRPO run, AIME24/25/HMMT25
                                         74.9/66.4/42.2 -> 75.6/68.1/44.4
qwen3_4b_rosd   8 GPUs        not found  ROSD's GRPO run, mean of five domains 69.86
qwen3_8b_rosd   8 GPUs        not found  ROSD's GRPO run, mean of five domains 71.99
tiny            any CPU       seconds    none: random weights, shows that everything runs

Departures: prompts have a chat template, and answers are graded as for the other methods. OPSD's
GRPO run uses plain text, and compares the first box as a string. ROSD's GRPO run makes four updates
per batch, and this project makes one. The learning rate of ROSD's GRPO run is a tenth of that of
its distillation runs. For a fair comparison, use the same learning rate for both runs.
"""

from copsd_jax import config as config_lib


def _smollm2() -> config_lib.Config:
    """Returns settings for 135M parameters: worked examples, groups of four."""
    c = config_lib.default()
    c.description = "GRPO on the bundled English problems"
    c.method = "grpo"
    c.rollout.per_prompt = 4
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
    c.method = "grpo"
    c.rollout.per_prompt = 2
    c.model.init = "random"
    c.model.path = "tiny"
    c.model.shape = "tiny"
    c.prompt.thinking = c.eval.thinking = "off"
    c.rollout.max_tokens = 8
    c.train.steps = 2
    c.train.batch = 4
    c.train.save_every = 1
    c.train.lr = 1e-3
    c.eval.limit = 4
    return c


def _rosd(size: str) -> config_lib.Config:
    """Returns the published recipe; a comment marks settings that the paper does not give."""
    c = config_lib.default()
    c.description = "GRPO as in ROSD's paper: no division by std, token mean, higher upper clip"
    c.model.path = f"Qwen/Qwen3-{size}"
    c.model.remat = "layer"  # our choice, to save memory
    c.data.path = ""  # must be given: --config.data.path
    c.prompt.thinking = c.eval.thinking = "off"
    c.prompt.max_tokens = 2048
    c.rollout.per_prompt = 8
    c.rollout.max_tokens = 8192
    c.rollout.temperature = 1.0
    c.method = "grpo"
    c.policy.scale = "none"
    c.policy.clip_low = 0.2
    c.policy.clip_high = 0.28
    c.policy.dual_clip = 3.0
    c.policy.norm = "token"
    c.policy.rollout_clip = 2.0
    c.train.trainable = "full"
    c.train.steps = 100  # our choice: the paper gives 10 epochs
    c.train.batch = 32
    c.train.micro_batch = 64
    c.train.lr = 1e-6
    c.train.schedule = "constant"
    c.train.warmup = 10
    c.train.weight_decay = 0.01
    c.train.max_grad_norm = 1.0
    c.eval.path = ""  # must be given: --config.eval.path
    c.eval.samples = 16
    c.eval.temperature = 0.6
    c.eval.top_p = 0.95
    return c


def _opsd() -> config_lib.Config:
    """Returns OPSD's GRPO run; a comment marks settings that the paper does not give."""
    c = config_lib.default()
    c.description = "GRPO as in OPSD's paper, but with a chat template"
    c.method = "grpo"
    c.model.path = "Qwen/Qwen3-4B"
    c.model.remat = "layer"  # our choice, to save memory
    c.data.path = ""  # must be given: --config.data.path
    c.prompt.thinking = c.eval.thinking = "on"  # our choice: the original has no template
    c.prompt.max_tokens = 2048
    c.rollout.per_prompt = 8
    c.rollout.max_tokens = 16_000
    c.rollout.temperature = 1.2
    c.policy.rollout_clip = 2.0
    c.train.steps = 500  # upper limit; the original runs 2 epochs
    c.train.batch = 4
    c.train.micro_batch = 8
    c.train.lr = 2e-5
    c.train.save_every = 50
    c.eval.path = ""  # must be given: --config.eval.path
    c.eval.samples = 12
    c.eval.temperature = 1.0
    c.eval.top_p = 0.95
    c.eval.max_tokens = 38_912
    c.eval.extract = "last_anywhere"
    return c


PRESETS = {
    "smollm2": _smollm2,
    "tiny": _tiny,
    "qwen3_4b": _opsd,
    "qwen3_4b_rosd": lambda: _rosd("4B"),
    "qwen3_8b_rosd": lambda: _rosd("8B"),
}


def get_config(preset: str = "") -> config_lib.Config:
    """Returns the settings of a preset, or of `smollm2` if `preset` is empty."""
    return config_lib.preset(PRESETS, preset, "smollm2")()
