"""Oracle: the picture in the module's docstring, and plain Python lists."""

import numpy as np
import pytest

from copsd_jax.training import layout


def test_picture_in_numbers():
    batch = layout.build_batch([[1, 2]], [[3, 4, 5, 6]], [[7, 8, 9]])
    assert batch.student.tokens_BL[0, :6].tolist() == [1, 2, 7, 8, 9, 0]
    assert batch.student.segments_BL[0, :6].tolist() == [1, 1, 1, 1, 1, 0]
    assert batch.student.gather_BC[0, :3].tolist() == [1, 2, 3]
    assert batch.teacher.tokens_BL[0, :8].tolist() == [3, 4, 5, 6, 7, 8, 9, 0]
    assert batch.teacher.gather_BC[0, :3].tolist() == [3, 4, 5]
    assert batch.mask_BC[0].sum() == 3


def test_bug_04_first_token_is_predicted_from_the_last_prompt_token():
    """Prompts of unequal length in one batch: no gap, no padding inside, every position right."""
    students = [[11, 12, 13], [21], [31, 32, 33, 34, 35]]
    teachers = [[41] * 40, [51, 52], [61, 62, 63]]
    completions = [[1, 2], [3], [4, 5, 6, 7]]
    batch = layout.build_batch(students, teachers, completions, student_prefix=9, teacher_prefix=4)
    for side, prompts, prefix in ((batch.student, students, 9), (batch.teacher, teachers, 4)):
        flat = side.tokens_BL.reshape(-1)
        positions = side.positions_BL.reshape(-1)
        for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            whole = [*prompt, *completion]
            for t, token in enumerate(completion):
                at = side.gather_BC[b, t]
                assert flat[at] == whole[len(prompt) + t - 1]
                assert flat[at + 1] == token
                assert positions[at] == prefix + len(prompt) + t - 1
            assert side.segments_BL[b].tolist() == [1] * len(whole) + [0] * (
                side.tokens_BL.shape[1] - len(whole)
            )


def test_bug_06_an_end_token_that_equals_padding_is_counted():
    batch = layout.build_batch([[5]], [[5]], [[3, 0]])  # 0 is what padding holds
    assert batch.mask_BC[0].sum() == 2


def test_both_sides_gather_the_same_tokens():
    rng = np.random.default_rng(0)
    draw = lambda n: [rng.integers(1, 99, rng.integers(1, 50)).tolist() for _ in range(n)]  # noqa: E731
    batch = layout.build_batch(draw(6), draw(6), draw(6))
    for side in (batch.student, batch.teacher):
        flat = side.tokens_BL.reshape(-1)
        picked = flat[np.minimum(side.gather_BC + 1, flat.size - 1)]
        assert (picked == batch.completion_BC)[batch.mask_BC].all()


def test_empty_prompt_and_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        layout.build_batch([[]], [[1]], [[2]])
    with pytest.raises(ValueError, match="must be equal"):
        layout.build_batch([[1]], [[1], [2]], [[2]])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 256, 257, 2048, 2049, 5000])
def test_bucket_is_no_shorter_and_wastes_little(length):
    size = layout.pad_row_length(length)
    assert size >= length
    assert size - length < max(32, length / 4 + 1)
