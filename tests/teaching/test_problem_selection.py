"""A language of the settings without a row is refused, unless its share is 0."""

import pytest

from copsd_jax import config as config_lib
from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import problem_selection


@pytest.mark.parametrize("weights", [(), (0.5, 0.5), (1.0, 0.0)])
def test_a_language_with_a_share_needs_a_row(weights):
    config = config_lib.default()
    config.data.lang, config.data.weights = ("en", "swa"), weights
    rows = [problem_row.Row("1/en", "p", "s", "a", "en", "p")]
    registry = languages.load_languages("")
    if weights and not weights[1]:
        problem_selection.check_language_shares(config, rows, registry)
        return
    with pytest.raises(ValueError, match=r"is 'swa': this language has no row; set its data"):
        problem_selection.check_language_shares(config, rows, registry)
    # The code of a setting and that of a row may be two names of one language.
    swahili = problem_row.Row("1/sw", "p", "s", "a", "sw", "p")
    problem_selection.check_language_shares(config, [*rows, swahili], registry)
