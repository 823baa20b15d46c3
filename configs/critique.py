"""Step-aligned critique: the teacher sees a corrected version of the student's steps.

Paper: arXiv 2606.11173. A frozen critic rewrites the attempt from the first wrong step on, in the
format of the attempt. The critic never quotes the error. The loss is KL(teacher || student) on all
tokens.

    python -m copsd_jax.main --config=configs/critique.py             # SmolLM2, bundled problems
    python -m copsd_jax.main --config=configs/critique.py:qwen3_1_7b --config.data.path=FILE \
        --config.author.url=http://host:8000/v1 --config.author.model=Qwen/QwQ-32B

Preset       device        hours      published, 30 problems: pass@12, maj@12, avg@12
smollm2      2 CPU cores   0.15       none: the embedded default, critiques from a rule
qwen3_1_7b   4 x H100      not found  90.00, 56.67, 35.83 (reference solution: 86.67, 43.33, 30.56)
tiny         any CPU       seconds    none: random weights, shows that everything runs

The paper does not state its clip, so this card uses the clip of OPSD. The critic's replies are kept
in `author.cache`. The published run chooses the best checkpoint on the 30 test problems. This
project reports the last checkpoint.
"""

from copsd_jax import config as config_lib


def _smollm2() -> config_lib.Config:
    """Returns settings for 135M parameters: worked examples, and critiques from a rule."""
    c = config_lib.default()
    c.description = "step-aligned critique on the bundled English problems, from a rule"
    c.context.kind = "critique"
    c.author.kind = "grader"
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
    c.context.kind = "critique"
    c.author.kind = "grader"
    c.prompt.form = "step_tags"
    c.author.max_tokens = 64
    c.model.init = "random"
    c.model.path = "tiny"
    c.model.shape = "tiny"
    c.prompt.thinking = c.teacher.thinking = c.eval.thinking = "off"
    c.rollout.max_tokens = 8
    c.train.steps = 2
    c.train.batch = 8
    c.train.save_every = 1
    c.train.lr = 1e-3
    c.eval.limit = 4
    return c


def _qwen3_1_7b() -> config_lib.Config:
    """Returns the published recipe; a comment marks settings that the paper does not give."""
    c = config_lib.default()
    c.description = "step-aligned critique as published: from a server, student not thinking"
    c.model.path = "Qwen/Qwen3-1.7B"
    c.model.remat = "layer"  # our choice, to save memory
    c.data.path = ""  # must be given: --config.data.path
    c.context.kind = "critique"
    c.author.kind = "server"
    c.author.url = "http://localhost:8000/v1"
    c.author.model = "Qwen/QwQ-32B"
    c.author.temperature = 0.0
    c.author.max_tokens = 16_384  # our choice
    c.author.cache = "critiques"
    c.prompt.form = "step_tags"
    c.prompt.thinking = "off"
    c.teacher.thinking = "on"
    c.eval.thinking = "off"
    c.parity.template_mismatch = True
    c.rollout.max_tokens = 2048
    c.rollout.temperature = 1.1
    c.rollout.top_p = 0.95
    c.rollout.top_k = 20
    c.loss.temperature = 1.1
    c.loss.clip_mode = "element"  # our choice, as in OPSD
    c.loss.clip = 0.05  # our choice, as in OPSD
    c.loss.norm = "micro_token_mean"  # our choice, as in OPSD
    c.loss.group = 4  # our choice, as in OPSD
    c.train.steps = 70
    c.train.batch = 32
    c.train.micro_batch = 16
    c.train.lr = 5e-6
    c.train.max_grad_norm = 0.1  # our choice, as in OPSD; so is the linear schedule
    c.train.save_every = 10
    c.train.keep = 0
    c.eval.path = ""  # must be given: --config.eval.path
    c.eval.samples = 12
    c.eval.temperature = 1.0  # our choice
    return c


PRESETS = {
    "smollm2": _smollm2,
    "tiny": _tiny,
    "qwen3_1_7b": _qwen3_1_7b,
}


def get_config(preset: str = "") -> config_lib.Config:
    """Returns the settings of a preset, or of `smollm2` if `preset` is empty."""
    return config_lib.preset(PRESETS, preset, "smollm2")()
