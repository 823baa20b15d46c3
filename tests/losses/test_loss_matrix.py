"""All pairs of settings of the divergence against float64; the full product with `-m slow`.

`make loss-matrix` runs the full product as well, and writes benchmarks/results/loss_matrix.txt.
"""

import itertools

import loss_cases
import numpy as np
import oracle
import pytest
from conftest import mostly_slow

PAIRS = loss_cases.pairs()


def test_every_pair_of_settings_occurs():
    """Counted anew: all that is allowed together is in one of the chosen cases."""
    names = list(loss_cases.FACTORS)

    def found(cases):
        return {
            (a, case[a], b, case[b]) for case in cases for a, b in itertools.combinations(names, 2)
        }

    assert found(PAIRS) == found(loss_cases.cases())
    assert len(PAIRS) < 80


@pytest.mark.parametrize("top_k", loss_cases.FACTORS["top_k"])
def test_the_slope_of_extreme_logits_is_the_oracles(top_k):
    """Where both are defined, they agree to rounding, for every divergence and clip."""
    for case in loss_cases.cases():
        usual = {"weights": "ratio", "temperature": 1.3, "dtype": "float32", "inputs": "normal"}
        wanted = {**usual, "implementation": "dense", "top_k": top_k}
        if {name: case[name] for name in wanted} == wanted:
            inputs, s, frozen = loss_cases.ready(case)
            args = (inputs.z_s, inputs.z_t, inputs.arrays[4], s, frozen)
            want = oracle.slope(*args)
            np.testing.assert_allclose(
                loss_cases.slope(*args), want, rtol=0, atol=1e-12 * np.abs(want).max()
            )


@pytest.mark.parametrize("case", mostly_slow(PAIRS, 12), ids=str)
def test_pairs(case):
    worst = loss_cases.errors(case)
    assert max(worst.values()) <= loss_cases.TOLERANCE[case["dtype"]], worst


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("implementation", loss_cases.IMPLEMENTATIONS)
def test_full_product(implementation):
    for case in loss_cases.product(implementation):
        worst = loss_cases.errors(case)
        assert max(worst.values()) <= loss_cases.TOLERANCE[case["dtype"]], (str(case), worst)
