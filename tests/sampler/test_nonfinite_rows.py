"""Logits that are not finite. Oracle: the same calls with finite logits, and NumPy on the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sampler
from test_truncation import PLAIN, SETTINGS, keys_of, problem, sample

from copsd_jax.sampler import engine, program_cache, truncation

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("whole", [True, False])
def test_only_rows_that_are_not_finite_have_such_log_probabilities(whole):
    """Every setting with every kind of row; masks of -inf are finite rows."""
    kinds = [(5, NAN), (5, INF), (slice(None), -INF), (slice(20, 200), -INF), (slice(0), 0.0)]
    settings = [setting for setting in SETTINGS for _ in kinds]
    logits, valid = problem(len(settings), 300)
    for row, (where, value) in zip(logits, kinds * len(SETTINGS), strict=True):
        row[where] = value
    right = [False, False, False, True, True] * len(SETTINGS)
    valid = np.ones(300, bool) if whole else valid
    _, logp, logp_truncated = sample(logits, keys_of(len(settings)), settings, valid)
    np.testing.assert_array_equal(np.isfinite(logp), right)
    assert np.isfinite(logp_truncated[right]).all()
    if whole:  # as a call without a mask
        run = jax.jit(
            lambda *args: truncation.sample(*args, truncation.find_features([PLAIN]), None)
        )
        rows = truncation.RowSettings(
            *(jnp.full(5, x, t) for x, t in zip(PLAIN, truncation.ROW_DTYPES, strict=True))
        )
        np.testing.assert_array_equal(np.isfinite(run(logits[:5], keys_of(5), rows)[1]), right[:5])


def forget_programs():
    """Programs that are traced with a changed function serve no other call."""
    program_cache._PROGRAMS.clear()
    jax.clear_caches()


@pytest.mark.parametrize("value", [NAN, pytest.param(INF, marks=pytest.mark.slow)])
def test_a_text_whose_logit_is_not_finite_is_dropped(monkeypatch, value):
    """From the third token of slot 2 on; the other texts are those of a call without it."""
    known = test_sampler.generate(test_sampler.PLAIN)
    forget_programs()
    draw = engine._draw

    def spoiled(features, constants, slots, drawn, logits_JV, step):
        late_J = (slots.drawn_J >= 2) & (jnp.arange(len(slots.drawn_J)) == 2)
        bad_JV = late_J[:, None] & (jnp.arange(logits_JV.shape[1]) == 17)[None]
        return draw(features, constants, slots, drawn, jnp.where(bad_JV, value, logits_JV), step)

    monkeypatch.setattr(engine, "_draw", spoiled)
    found = test_sampler.generate(test_sampler.PLAIN)
    forget_programs()
    lost = [i for i, one in enumerate(found) if one.finish == "nonfinite"]
    assert len(lost) == 1
    assert found[lost[0]].ids == ()
    assert found[lost[0]].logps.shape == found[lost[0]].logps_truncated.shape == (0,)
    for i, (one, other) in enumerate(zip(found, known, strict=True)):
        if i not in lost:
            assert (one.ids, one.finish) == (other.ids, other.finish)
            np.testing.assert_array_equal(one.logps, other.logps)


def test_a_prompt_with_nan_does_not_reach_the_next_text_of_its_slot():
    """One slot; the embedding of id 8 is NaN, and only prompt 1 has it."""
    prompts = [(5, 6, 7), (8, 8, 9) * 30, (1,), (2, 3), (5, 6)]
    valid_V = np.arange(300) != 8
    tree = jax.tree.map(jnp.copy, test_sampler.params())
    table_VD = tree["embed"]["embedding"]
    spoiled = tree | {"embed": {"embedding": table_VD.at[8].set(jnp.nan)}}
    options = {"prompts": prompts, "slots": 1, "pack": 1, "shared": False, "valid_V": valid_V}
    known = test_sampler.generate(test_sampler.PLAIN, params=tree, **options)
    found = test_sampler.generate(test_sampler.PLAIN, params=spoiled, **options)
    assert [one.finish == "nonfinite" for one in found] == [False, True, False, False, False]
    for i in (0, 2, 3, 4):
        assert found[i].ids == known[i].ids
        np.testing.assert_array_equal(found[i].logps, known[i].logps)
