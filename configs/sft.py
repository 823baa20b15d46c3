"""SFT: cross entropy on the reference solutions, the baseline without rollouts.

    python -m copsd_jax.main --config=configs/sft.py                  # SmolLM2, bundled problems
    python -m copsd_jax.main --config=configs/sft.py:qwen3_4b --config.data.path=FILE

Preset     device        hours      published: OPSD's SFT run, AIME24/25/HMMT25
smollm2    2 CPU cores   0.1        none: the embedded default
qwen3_4b   8 GPUs        not found  74.9/66.4/42.2 -> 70.2/62.3/43.4
tiny       any CPU       seconds    none: random weights, shows that everything runs

Departures: this card uses the chat template, and only the completion carries loss. In the published
script, there is no chat template, and the prompt carries loss too. This card uses LoRA, as the
paper says. The published script does not use LoRA.
"""

from copsd_jax import config as config_lib


def _smollm2() -> config_lib.Config:
    """Returns settings for 135M parameters: worked examples in front of every prompt."""
    c = config_lib.default()
    c.description = "SFT on the bundled English problems"
    c.method = "sft"
    c.policy.norm = "token"
    c.prompt.template = "plain"
    c.prompt.answer = "answer_is"
    c.prompt.exemplars = 4
    c.rollout.temperature = 0.8
    c.rollout.max_tokens = 40
    c.rollout.stop = ("\n",)
    c.rollout.slots = 16
    c.train.steps = 10
    c.train.batch = 16
    c.train.lr = 3e-4
    c.train.warmup = 2
    c.train.save_every = 5
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.eval.slots = 100
    return c


def _tiny() -> config_lib.Config:
    c = config_lib.default()
    c.description = "a random model of two layers, which shows that everything runs"
    c.method = "sft"
    c.model.init = "random"
    c.model.path = "tiny"
    c.model.shape = "tiny"
    c.prompt.thinking = c.eval.thinking = "off"
    c.rollout.max_tokens = 64
    c.train.steps = 2
    c.train.batch = 8
    c.train.save_every = 1
    c.train.lr = 1e-3
    c.eval.limit = 4
    return c


def _qwen3_4b() -> config_lib.Config:
    """Returns OPSD's SFT run; a comment marks settings that the paper does not give."""
    c = config_lib.default()
    c.description = "SFT as in OPSD's paper, but with a chat template"
    c.method = "sft"
    c.model.path = "Qwen/Qwen3-4B"
    c.model.remat = "layer"  # our choice, to save memory
    c.data.path = ""  # must be given: --config.data.path
    c.prompt.thinking = c.eval.thinking = "on"  # our choice: the original has no template
    c.prompt.max_tokens = 2048
    c.rollout.max_tokens = 13_952  # of the solution; plus 2,048 of the prompt: the published 16,000
    c.policy.norm = "token"
    c.train.steps = 1856  # 4 epochs of 29.7k rows, since 1 % of 30k rows is held out
    c.train.batch = 64
    c.train.micro_batch = 16
    c.train.lr = 2e-5
    c.train.save_every = 100
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
    "qwen3_4b": _qwen3_4b,
}


def get_config(preset: str = "") -> config_lib.Config:
    """Returns the settings of a preset, or of `smollm2` if `preset` is empty."""
    return config_lib.preset(PRESETS, preset, "smollm2")()
