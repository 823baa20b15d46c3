"""An evaluation that is stopped goes on: oracle, one that never was."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
import runs

from copsd_jax import evaluation
from copsd_jax.runtime import failures, fingerprints, sharding
from copsd_jax.training import loaded_run

optax_promotes = runs.optax_promotes


class Stopped(Exception):
    pass


def stopping(after):
    """A progress callback that stops an evaluation once so many completions are there."""

    def progress(stats):
        if stats.done >= after:
            raise Stopped

    return progress


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path):
    settings = {
        "eval__limit": 6, "eval__samples": 3, "eval__temperature": 1.0, "eval__slots": 2,
        "eval__max_tokens": 9,
    }  # fmt: skip
    partial = tmp_path / "eval" / "step_000000.partial.jsonl"
    with runs.loaded("opsd", **settings) as (r, state):
        policy, rows = loaded_run.derive_run_policies(r, state)[0], r.plan.eval_rows
        count = len(rows) * 3
        want = evaluation.evaluate(r, policy, rows)
        asked, sample = [], loaded_run.sample

        def counted(r, policy, prompts, *args, **options):
            asked.append(len(prompts))
            return sample(r, policy, prompts, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaded_run, "sample", counted)
            for after in (3, 8):
                with pytest.raises(Stopped):
                    evaluation.evaluate(r, policy, rows, stopping(after), partial)
                head, *lines = partial.read_text().splitlines()
                assert json.loads(head)["prompts"] == count
                assert after <= len(lines) < count
            # A line that was being written, and one more that has no end at all.
            partial.write_text(partial.read_text() + '{"index": 0, "id": "x", "i')
            seen = []
            got = evaluation.evaluate(r, policy, rows, seen.append, partial)
            # A finished one costs nothing; of another policy nothing is taken.
            assert evaluation.evaluate(r, policy, rows, None, partial) == want
            other = dataclasses.replace(
                policy, adapter=jax.tree.map(lambda x: x + 0.3, policy.adapter)
            )
            assert evaluation.evaluate(r, other, rows, None, partial) != want
        assert got == want
        assert asked[0] == count
        assert asked[2:] == [count - len(lines), count]
        assert seen[0].done > len(lines)
        assert seen[-1].done == count
        assert (
            json.loads(partial.read_text().splitlines()[0])["policy"] != json.loads(head)["policy"]
        )
        # What was written by another evaluation is not taken for this one's.
        text = partial.read_text()
        changed = json.dumps(json.loads(text.splitlines()[0]) | {"seed": 9}) + "\n"
        for spoilt, message in (
            (changed, "was written by an evaluation with other seed: remove this file"),
            ("garbage\n", "line 1 is not JSON: .*: remove this file"),
            ("[1, 2]\n", "line 1 is not a JSON object: remove this file"),
            (text + '{"index": 99999, "id": "x", "ids": [1], "finish": "stop"}\n', "is damaged"),
            (text + '{"index": 0, "id": "x"}\n', "has no 'ids': remove this file; its completions"),
            (text.replace('"id": "', '"id": "x'), "with other problems: remove this file"),
        ):
            partial.write_text(spoilt)
            with pytest.raises(failures.UnusableFile, match=message):
                evaluation.evaluate(r, other, rows, None, partial)


def test_fingerprints_of_weights():
    """Every bit and every place counts; the mesh and the order of sums do not."""
    tree = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones((8,), jnp.bfloat16)}
    want = fingerprints.fingerprint_arrays(tree)
    with jax.set_mesh(sharding.make_mesh(8, 1, 1)):
        mesh = sharding.current_mesh()
        placed = {
            "a": placing.replicate(tree["a"], mesh),
            "b": placing.place_batch(tree["b"], mesh),
        }
        assert fingerprints.fingerprint_arrays(placed) == want
    others = [
        tree | {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(8), np.float32(9)))},
        tree | {"a": tree["a"].at[0].set(tree["a"][1]).at[1].set(tree["a"][0])},
        tree | {"a": tree["a"].T.reshape(4, 6)},
        tree | {"b": tree["b"].at[7].set(-1)},
        {"a": tree["a"]},
    ]
    assert len({tuple(fingerprints.fingerprint_arrays(x)) for x in [tree, *others]}) == 6


def test_a_completion_that_was_dropped_is_drawn_again(tmp_path):
    """A file of an earlier version may have completions whose logits were not finite."""
    what = {"policy": [1], "prompts": 3, "sha256": "x"}
    ends = ("stop", "nonfinite", "failed")
    lines = [{"index": i, "id": f"r{i}", "ids": [5], "finish": end} for i, end in enumerate(ends)]
    path = tmp_path / "step_000003.partial.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [what, *lines]))
    assert list(evaluation._read_partial_evaluation(path, what, ["r0", "r1", "r2"])) == [0]
