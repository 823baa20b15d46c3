"""Oracle: what a token sees, from segments and parents, must be exactly its own prompt up to it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copsd_jax.sampler import prompt_packing

STEM = tuple(range(100, 120))


def test_the_picture():
    stem = STEM[:16]
    rows, places = prompt_packing.pack_row([(*stem, 1, 2), (*stem, 3), (7, 8)], 32)
    assert places[(7, 8)] == (0, 2, 0)
    assert places[(*stem, 1, 2)] == (2, 16, 18)
    assert places[(*stem, 3)] == (2, 16, 20)
    tokens, index, segments, parents = rows[:, :21]
    assert tokens.tolist() == [7, 8, *stem, 1, 2, 3]
    assert index.tolist() == [0, 1, *range(16), 16, 17, 16]
    assert segments.tolist() == [1, 1, *[2] * 16, 3, 3, 4]
    assert parents.tolist() == [*[-1] * 18, 2, 2, 2]
    assert (rows[2, 21:] == 0).all()
    assert (rows[3, 21:] == -1).all()


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([STEM, (*STEM, 1)], [20]),  # one is the beginning of the other
        ([STEM[:15], (*STEM[:15], 1)], [0, 0]),  # too little in common
        ([(*STEM, 1), (*STEM, 2), STEM[:18]], [18]),  # 2 x 18 tokens saved, not 20
        ([(*STEM, 1), (*STEM, 2), (*STEM, 3), (*STEM[:16], 4)], [16]),  # 48 instead of 40
        ([(*STEM * 3, 1), (*STEM * 3, 2), (*STEM[:16], 4)], [0, 60]),  # 32 instead of 60: no
        ([(1,), (1,), (2,)], [0, 0]),  # equal prompts once
    ],
)
def test_families_save_tokens(prompts, shared):
    found = prompt_packing.group_by_beginning(prompts)
    assert sorted(n for n, _ in found) == sorted(shared)
    assert sorted(p for _, members in found for p in members) == sorted(set(prompts))


texts = st.lists(
    st.tuples(st.integers(0, 22), st.lists(st.integers(0, 3), max_size=4)).filter(
        lambda p: p[0] or p[1]
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_every_token_sees_its_own_prompt(parts):
    prompts = [(*(STEM * 2)[:n], *rest) for n, rest in parts]
    total = prompt_packing.count_tokens(prompts)
    assert total <= sum(map(len, set(prompts)))
    rows, places = prompt_packing.pack_row(prompts, total)
    tokens, index, segments, parents = rows
    assert (segments > 0).all()
    for prompt, place in places.items():
        at = [*range(place.start, place.start + place.split),
              *range(place.own, place.own + len(prompt) - place.split)]  # fmt: skip
        assert tuple(tokens[at]) == prompt
        assert index[at].tolist() == list(range(len(prompt)))
        last = at[-1]
        same = (segments == segments[last]) | (segments == parents[last])
        seen = np.flatnonzero(same & (np.arange(total) <= last))
        assert seen.tolist() == at
    assert set(places) == set(prompts)


def test_fit_counts_what_is_in_common_once():
    prompts = [(*STEM, i) for i in range(5)]
    assert [prompt_packing.count_fitting(prompts, width) for width in (20, 21, 22, 23, 25, 99)] == [
        0,
        1,
        2,
        3,
        5,
        5,
    ]
    for n, width in itertools.product(range(6), (10, 30, 60)):
        many = [tuple(range(k, k + 9 + k)) for k in range(n)]
        count = prompt_packing.count_fitting(many, width)
        assert count == 0 or prompt_packing.count_tokens(many[:count]) <= width
        assert count == n or prompt_packing.count_tokens(many[: count + 1]) > width


@pytest.mark.parametrize(
    "pack, longest, widths",
    [(512, 90, (128, 256, 512)), (512, 700, (128, 256, 512, 1024)), (1, 1, (128,)),
     (129, 1, (128, 144)), (400, 90, (128, 256, 400)), (400, 700, (128, 256, 400, 512, 1024)),
     (300, 512, (128, 256, 304, 512))],
)  # fmt: skip
def test_buckets(pack, longest, widths):
    assert prompt_packing.list_buckets(pack, longest) == widths
