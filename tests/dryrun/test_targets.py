"""Oracle: Cloud TPU's names and topologies written out by hand; products of shapes."""

import math

import pytest

from copsd_jax.dryrun import targets


@pytest.mark.parametrize(
    "text, kind, shape, slices",
    [
        ("v5e:4x8", "v5e", (4, 8), 1),
        ("v5e-32", "v5e", (4, 8), 1),
        ("v5litepod-16", "v5e", (4, 4), 1),
        ("V6E-256", "v6e", (16, 16), 1),
        ("v5p-128", "v5p", (4, 4, 4), 1),  # its number counts cores
        ("v4-8", "v4", (2, 2, 1), 1),
        ("tpu7x-16", "tpu7x", (2, 2, 2), 1),
        ("2*v5e:16x16", "v5e", (16, 16), 2),
        ("4*v5p-64", "v5p", (2, 4, 4), 4),
        ("cuda:h200:1x8", "h200", (1, 8), 1),
        ("cuda:2x8", "h100", (2, 8), 1),
    ],
)
def test_names(text, kind, shape, slices):
    found = targets.parse_target(text)
    assert (found.kind, found.shape, found.slices) == (kind, shape, slices)
    assert found.platform == ("cuda" if text.startswith("cuda") else "tpu")
    assert found.topology == "x".join(map(str, shape))
    assert found.name == text


@pytest.mark.parametrize("table", [targets.TOPOLOGIES_2D, targets.TOPOLOGIES_3D])
def test_topologies_have_as_many_chips_as_their_name_says(table):
    for count, topology in table.items():
        assert math.prod(map(int, topology.split("x"))) == count


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5e:4x4x4", "has 2 numbers, like 16x16"),
        ("v5p:4x4", "has 3 numbers, like 16x16x16"),
        ("v5e-24", "the names for v5e are v5e-1, v5e-4, v5e-8"),
        ("v5p-7", "the names for v5p are v5p-8, v5p-16"),
        ("v9:2x2", "examples of valid names are v5e:4x8"),
        ("v5e", "examples of valid names are"),
        ("0*v5e:2x2", "at least 1"),
        ("cuda:b200:1x8", "CARD is one of a100, h100, h200"),
        ("cuda:h100:0x8", "at least one host"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(ValueError, match="--dry_run is") as error:
        targets.parse_target(text)
    assert said in str(error.value)


def test_every_kind_has_a_chip_with_all_numbers():
    for name in (
        *(f"{kind}-8" for kind in targets.TPU_KINDS),
        *(f"cuda:{c}:1x1" for c in targets.GPU_KINDS),
    ):
        chip = targets.parse_target(name).chip
        assert 0 < chip.network < chip.link < chip.bandwidth < chip.flops
        assert 0.9 * chip.memory < chip.usable < 1.1 * chip.memory
        assert bool(chip.vmem) == (not name.startswith("cuda"))
