"""Experiment cards: the embedded defaults differ in their method alone, and published numbers are
those of the papers, written down here apart. (That presets are valid: `test_config`.)"""

import importlib.util

import conftest
import pytest

from copsd_jax.config import cards
from copsd_jax.config import settings as config_lib
from copsd_jax.training import table_rules

CARDS = ("opsd", "copsd", "rosd", "critique", "sdpo", "grpo", "sft")


def load(name):
    spec = importlib.util.spec_from_file_location(name, conftest.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_cards_are_here():
    assert {path.stem for path in (conftest.ROOT / "configs").glob("*.py")} == set(CARDS)


SHARED = (
    "model.", "prompt.", "rollout.temperature", "rollout.top", "rollout.max_tokens",
    "rollout.stop", "eval.", "lora.", "train.weight_decay", "train.max_grad_norm", "data.path",
)  # fmt: skip


@pytest.mark.parametrize("card", CARDS[1:])
def test_embedded_defaults_share_prompts_rollouts_grader_and_budget(card):
    ours = config_lib.flat(load("opsd").get_config())
    other = config_lib.flat(load(card).get_config())
    changed = {n for n in ours if ours[n] != other[n] and n.startswith(SHARED)}
    assert not changed
    completions = other["train.batch"] * other["rollout.per_prompt"]
    assert completions == ours["train.batch"] == 16
    if card != "copsd":  # which trains in Swahili, with a rate and length of its own
        for name in ("train.steps", "train.warmup", "train.schedule", "data.lang"):
            assert other[name] == ours[name], name
    # Methods with groups have few completions with loss a step, and one lower rate.
    grouped = other["rollout.per_prompt"] > 1
    if card != "copsd":
        assert other["train.lr"] == (5e-5 if grouped else ours["train.lr"])


PUBLISHED = {
    ("rosd", "qwen3_4b"): {
        "rollout.per_prompt": 8, "train.batch": 32, "train.lr": 1e-5, "train.warmup": 10,
        "train.schedule": "constant", "train.max_grad_norm": 1.0, "rollout.max_tokens": 8192,
        "loss.divergence": "jsd", "loss.beta": 0.5, "loss.top_k": 100, "loss.tail": True,
        "loss.top_k_of": "student", "loss.rollout_clip": 2.0, "loss.group": 2,
        "rollout.temperature": 1.0, "rollout.top_p": 1.0, "teacher.weights": "fixed",
        "teacher.max_tokens": 10_240, "train.weight_decay": 0.01, "train.trainable": "full",
        "prompt.thinking": "off", "author.kind": "student", "context.filter_groups": True,
        "eval.samples": 16, "eval.temperature": 0.6, "eval.top_p": 0.95,
    },
    ("sdpo", "qwen3_8b"): {
        "rollout.per_prompt": 8, "train.batch": 32, "train.lr": 1e-5, "train.warmup": 10,
        "teacher.weights": "ema", "teacher.ema_decay": 0.95, "loss.top_k": 100,
        "loss.tail": True, "loss.divergence": "jsd", "context.sibling": "first",
        "context.feedback": "never", "reward.threshold": 0.5,
    },
    ("critique", "qwen3_1_7b"): {
        "rollout.per_prompt": 1, "train.batch": 32, "train.lr": 5e-6, "rollout.max_tokens": 2048,
        "rollout.temperature": 1.1, "loss.divergence": "fkl", "lora.rank": 64,
        "lora.alpha": 128.0, "prompt.thinking": "off", "teacher.thinking": "on",
        "author.temperature": 0.0, "teacher.weights": "fixed", "eval.samples": 12,
    },
    ("grpo", "qwen3_4b"): {
        "rollout.per_prompt": 8, "train.batch": 4, "train.lr": 2e-5, "rollout.temperature": 1.2,
        "rollout.max_tokens": 16_000, "prompt.max_tokens": 2048, "policy.kl": 0.0,
        "policy.scale": "std", "policy.clip_low": 0.2, "policy.clip_high": 0.2,
        "policy.norm": "sequence", "lora.rank": 64,
    },
    ("grpo", "qwen3_8b_rosd"): {
        "train.lr": 1e-6, "policy.scale": "none", "policy.clip_low": 0.2, "policy.clip_high": 0.28,
        "policy.norm": "token", "policy.kl": 0.0, "policy.rollout_clip": 2.0,
        "policy.dual_clip": 3.0, "train.trainable": "full",
    },
    ("sft", "qwen3_4b"): {
        "train.lr": 2e-5, "train.schedule": "linear", "train.batch": 64, "lora.rank": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("card", CARDS)
def test_one_setting_shortens_a_run(card, steps):
    """Every preset with only another number of steps, and with the files that it asks for."""
    for preset in load(card).PRESETS:
        argument = f"{conftest.ROOT / 'configs' / card}.py:{preset}"
        config = cards.load_card(argument)
        config.data.path = config.data.path or "rows.jsonl"
        for name in ("author.url", "author.path"):
            section, key = name.split(".")
            if config.author.kind == {"url": "server", "path": "file"}[key]:
                config[section][key] = config[section][key] or "http://host:1/v1"
        config.train.steps = steps
        table_rules.check_choices(config)


@pytest.mark.parametrize("card, preset", list(PUBLISHED))
def test_published_settings(card, preset):
    config = config_lib.flat(load(card).get_config(preset))
    wanted = PUBLISHED[card, preset]
    assert {name: config[name] for name in wanted} == wanted
