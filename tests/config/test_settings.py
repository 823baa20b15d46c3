"""Oracle: the rules written out as cases; the comments of the source for the help text."""

import importlib.util

import conftest
import pytest

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.training import table_rules

CARDS = sorted((conftest.ROOT / "configs").glob("*.py"))


def card(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(**settings):
    config = config_lib.default()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_every_preset_is_valid_once_its_data_is_named(path):
    module = card(path)
    assert {"smollm2", "tiny"} <= set(module.PRESETS)
    for name in module.PRESETS:
        config = module.get_config(name)
        if not config.data.path:
            with pytest.raises(ValueError, match=r"data\.path is '': name a file"):
                table_rules.check_choices(config)
            config.data.path = "rows.jsonl"
        table_rules.check_choices(config)
        assert name in module.__doc__ or name.endswith("_nothink")
    with pytest.raises(ValueError, match="preset is 'huge': the choices are smollm2, tiny"):
        module.get_config("huge")


PUBLISHED = {  # ALGORITHMS 1.8: completion, norm, clip, steps, schedule, save, group
    ("opsd", "qwen3_1_7b"): (1024, 0.1, 0.05, 100, "linear", 25, 4),
    ("opsd", "qwen3_1_7b_nothink"): (1024, 0.1, 1e-6, 100, "constant", 25, 4),
    ("opsd", "qwen3_4b_nothink"): (1024, 0.1, 1e-6, 100, "constant", 25, 4),
    ("opsd", "qwen3_8b_nothink"): (1024, 0.1, 1e-7, 50, "constant", 25, 2),
    ("copsd", "qwen3_1_7b"): (2048, 0.1, 0.05, 100, "linear", 5, 4),
    ("copsd", "qwen3_4b"): (2048, 0.1, 0.05, 100, "linear", 5, 4),
    ("copsd", "qwen3_8b"): (2048, 0.1, 0.05, 100, "linear", 5, 2),
    ("copsd", "qwen3_4b_polymath"): (2048, 0.1, 0.05, 100, "linear", 5, 4),
}


def test_paper_presets_hold_the_published_numbers():
    for (name, preset), row in PUBLISHED.items():
        c = card(conftest.ROOT / "configs" / f"{name}.py").get_config(preset)
        found = (
            c.rollout.max_tokens, c.train.max_grad_norm, c.loss.clip, c.train.steps,
            c.train.schedule, c.train.save_every, c.loss.group,
        )  # fmt: skip
        assert found == row, (name, preset)
        assert (c.train.batch, c.train.lr, c.train.weight_decay) == (32, 5e-6, 0.0)
        assert (c.lora.rank, c.lora.alpha, len(c.lora.targets)) == (64, 128.0, 7)
        assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k) == (1.1, 0.95, 20)
        assert (c.loss.divergence, c.loss.clip_mode, c.loss.temperature) == ("fkl", "element", 1.1)
        assert (c.loss.norm, c.teacher.weights, c.loss.top_k) == ("micro_token_mean", "fixed", 0)
        thinking = (c.prompt.thinking, c.teacher.thinking)
        expected = {"copsd": ("prefix", "prefix")}.get(
            name, ("off", "off") if preset.endswith("nothink") else ("off", "on")
        )
        assert thinking == expected
        assert c.parity.template_mismatch == (thinking == ("off", "on"))


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"loss__top_k": -1}, r"loss\.top_k is -1"),
        ({"rollout__top_k": -1}, r"rollout\.top_k is -1"),
        ({"loss__divergence": "kl"}, r"'kl': the choices are fkl, rkl, jsd, (\w+, )*sampled"),
        ({"method": "ppo"}, r"method is 'ppo': the choices are distill, grpo, sft"),
        ({"train__micro_batch": 5}, r"micro_batch is 5: it must divide .* 32 x 1 = 32"),
        ({"loss__group": 5}, r"loss\.group is 5"),
        ({"loss__beta": 1.0}, r"loss\.beta is 1\.0"),
        ({"policy__clip_low": 1.0}, r"policy\.clip_low is 1\.0: .* below 1"),
        ({"policy__dual_clip": 1.0}, r"policy\.dual_clip is 1\.0: it must be above 1"),
        ({"reward__threshold": float("inf")}, r"reward\.threshold is inf: it must be finite"),
        ({"loss__tail": True}, r"loss\.tail is True: loss\.top_k is 0"),
        ({"rollout__temperature": -0.1}, r"rollout\.temperature is -0\.1"),
        ({"rollout__stop": ("",)}, r"must not be empty"),
        ({"train__lr": float("nan")}, r"train\.lr is nan"),
        ({"lora__targets": ("q", "z")}, r"'z': the choices are q, k"),
        ({"data__weights": (1.0, 2.0)}, r"data\.weights .* one number for each"),
        ({"loss__divergence": "sampled", "loss__clip_mode": "token"}, r"loss\.clip_mode=none"),
        ({"context__kind": "crosslingual", "context__problem_en": False,
          "context__solution": False}, r"context\.problem_en is False"),
        ({"model__shape": "tiny"}, r"model\.init=random"),
    ],
)  # fmt: skip
def test_refusals_name_setting_value_and_choices(settings, words):
    table_rules.check_choices(config_lib.default())
    with pytest.raises(ValueError, match=words):
        table_rules.check_choices(changed(**settings))


def test_top_k_above_the_vocabulary_and_a_mesh_that_does_not_divide():
    for name in ("loss", "rollout", "eval", "author"):
        config = changed(**{f"{name}__top_k": 513})
        setting_rules.check_top_k_settings(config, 513)
        with pytest.raises(ValueError, match=rf"{name}\.top_k is 513: the model has 512"):
            setting_rules.check_top_k_settings(config, 512)
    setting_rules.check_shard_settings(config_lib.default(), 8)
    with pytest.raises(ValueError, match=r"train\.batch is 32: 32 .* over 3 devices"):
        setting_rules.check_shard_settings(config_lib.default(), 3)


def test_unknown_settings_get_the_likely_ones():
    assert "train.steps" in config_lib.unknown_setting("trian.steps")
    assert "--help" in config_lib.unknown_setting("qqqqqq")
    assert "leave it out" in config_lib.unknown_setting("loss.skip_below")
    for name in ("teacher", "teacher."):
        said = f"--config.{name} is a section of settings: write --config.teacher.NAME=VALUE, "
        wanted = said + "where NAME is one of weights, rho, ema_decay, thinking, max_tokens"
        assert config_lib.unknown_setting(name) == wanted


def test_counts_are_singular_or_plural():
    counts = [config_lib.spell_count(number, "step") for number in (0, 1, 2, 1000)]
    assert counts == ["0 steps", "1 step", "2 steps", "1000 steps"]


def test_lists_on_the_command_line_are_split_at_commas():
    config = config_lib.default()
    config.data.lang = ("sw,fr", "en")
    config_lib.split_lists(config)
    assert config.data.lang == ("sw", "fr", "en")
