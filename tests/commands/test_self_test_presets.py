"""The self-test raises no false alarm: small random weights under each preset's settings pass."""

import importlib.util

import conftest
import pytest
import runs

from copsd_jax import main, self_test
from copsd_jax.training import loaded_run, run_plan

optax_promotes = runs.optax_promotes
pytestmark = pytest.mark.slow


def list_presets():
    """Lists (card, preset) for all cards."""
    presets = []
    for path in sorted((conftest.ROOT / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        presets += [(path.stem, name) for name in module.PRESETS]
    return presets


def check(card, preset, dtype):
    """Tests a preset with other settings of the model, of data, of sizes and of servers."""
    settings = {
        "model.init": "random", "model.path": "tiny", "model.shape": "tiny", "model.dtype": dtype,
        "data.path": "bundled:train", "data.fields": "", "data.limit": 8, "data.missing": "drop",
        "eval.path": "bundled:held_out", "eval.fields": "", "eval.limit": 2, "eval.max_tokens": 8,
        "train.batch": 8, "train.micro_batch": 0, "rollout.max_tokens": 16, "rollout.slots": 4,
        "loss.group": 0,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    chosen = f"{conftest.ROOT / 'configs' / card}.py" + (f":{preset}" if preset else "")
    config = main.parse_command(["main", f"--config={chosen}", *flags])[0]
    if config.author.kind != "none":
        config.author.max_tokens = 16
    plan = run_plan.make_plan(config)
    with loaded_run.set_mesh_and_precision(plan):
        r, state = loaded_run.load_run(plan, 1)
        line = self_test.check(r, state)
    print(card, preset, dtype, line)


@pytest.mark.parametrize("card", sorted({card for card, _ in list_presets()}))
def test_the_default_preset_of_a_card_passes(card):
    check(card, "", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("card, preset", list_presets())
def test_every_preset_passes(card, preset, dtype):
    check(card, preset, dtype)
