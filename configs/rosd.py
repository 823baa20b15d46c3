"""ROSD: reflective on-policy self-distillation, localised from the first error on.

Paper: arXiv 2605.28014. Eight rollouts a problem; one that is wrong in a group with a success is
diagnosed, one that is right is explained; the teacher sees the reflection, and the tokens from the
quoted error on are distilled.

    python -m copsd_jax.main --config=configs/rosd.py                 # SmolLM2, bundled problems
    python -m copsd_jax.main --config=configs/rosd.py:qwen3_4b --config.data.path=FILE

Preset     device        hours      published, mean@16 over five domains
smollm2    2 CPU cores   0.15       none: the embedded default, reflections by a rule
qwen3_4b   8 GPUs        not found  72.83 (GRPO 69.86, SDPO 67.02)
qwen3_8b   8 GPUs        not found  73.45 (GRPO +1.46 below, SDPO .95 below)
tiny       any CPU       seconds    none: random weights, to see that everything runs

A model of 135M parameters writes no usable reflection: the embedded default takes them from a rule
that knows the steps of the bundled problems. Its groups have four completions.

Departures: an error that is not found leaves its completion out (published: the whole completion is
distilled, `tokens.on_failure=full`); a reflection that cannot be read leaves it out too (published:
the sibling's solution, `parity.reflection_fallback`). The published comparison trains GRPO at a
tenth of the learning rate and SDPO with another teacher; see the cards of both.
"""

from copsd_jax import config as config_lib


def _smollm2() -> config_lib.Config:
    """135M parameters: worked examples in both prompts, reflections from a rule, groups of four."""
    c = config_lib.default()
    c.description = "ROSD on the bundled English problems, reflections by a rule"
    c.context.kind = "reflection"
    c.context.filter_groups = True
    c.author.kind = "grader"
    c.tokens.select = "from_error"
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
    c.train.lr = 5e-5  # 3e-4 lowers the score, see benchmarks/results/methods.md
    c.train.warmup = 2
    c.train.save_every = 5
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.eval.slots = 100
    return c


def _tiny() -> config_lib.Config:
    c = config_lib.default()
    c.description = "a random model of two layers: shows that everything runs, learns nothing"
    c.context.kind = "reflection"
    c.author.kind = "grader"
    c.tokens.select = "from_error"
    c.tokens.on_failure = "full"
    c.rollout.per_prompt = 2
    c.loss.divergence = "jsd"
    c.loss.top_k = 10
    c.loss.top_k_of = "student"
    c.loss.tail = True
    c.author.max_tokens = 64
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
    """The published recipe; settings the paper leaves open are marked."""
    c = config_lib.default()
    c.description = "ROSD, reflections by the student, frozen teacher"
    c.model.path = f"Qwen/Qwen3-{size}"
    c.model.remat = "layer"  # ours: memory
    c.data.path = ""  # give --config.data.path
    c.prompt.thinking = c.teacher.thinking = c.eval.thinking = "off"
    c.prompt.max_tokens = 2048
    c.teacher.max_tokens = 10_240
    c.rollout.per_prompt = 8
    c.rollout.max_tokens = 8192
    c.rollout.temperature = 1.0
    c.context.kind = "reflection"
    c.context.filter_groups = True
    c.author.kind = "student"
    c.author.max_tokens = 4096
    c.author.temperature = 0.0  # as intended; the original sampled at 1
    c.tokens.select = "from_error"
    c.loss.divergence = "jsd"
    c.loss.top_k = 100
    c.loss.top_k_of = "student"
    c.loss.tail = True
    c.loss.rollout_clip = 2.0
    c.loss.group = 2
    c.train.trainable = "full"
    c.train.steps = 100  # ours: the paper counts 10 epochs
    c.train.batch = 32
    c.train.micro_batch = 16
    c.train.lr = 1e-5
    c.train.schedule = "constant"
    c.train.warmup = 10
    c.train.weight_decay = 0.01
    c.train.max_grad_norm = 1.0
    c.eval.path = ""  # give --config.eval.path
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
    """The settings of a preset; `smollm2` if none is named."""
    return config_lib.preset(PRESETS, preset, "smollm2")()
