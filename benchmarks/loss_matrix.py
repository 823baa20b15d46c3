"""Compares all combinations of the divergence's settings with float64; prints the largest errors.

    python benchmarks/loss_matrix.py [--implementations=dense,chunked] > loss_matrix.txt

`tests/losses/test_loss_matrix.py` makes the same comparison, but only for all pairs of settings.
Kernels run in interpret mode. The script needs the package's extra `test`.
"""

import argparse
import collections
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  the strict switches of the tests
import jax  # noqa: E402
import loss_cases  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join(loss_cases.IMPLEMENTATIONS)
    parser.add_argument("--implementations", default=every, help=f"of {every}; default all")
    wanted = parser.parse_args().implementations.split(",")
    if unknown := set(wanted) - set(loss_cases.IMPLEMENTATIONS):
        choices = ", ".join(loss_cases.IMPLEMENTATIONS)
        parser.error(f"--implementations has {', '.join(sorted(unknown))}: choices are {choices}")
    started = time.time()
    worst: dict = collections.defaultdict(lambda: collections.defaultdict(lambda: (0.0, "")))
    counts, failures = collections.Counter(), []
    for case in (case for name in wanted for case in loss_cases.product(name)):
        kind = case["implementation"], case["dtype"]
        try:
            found = loss_cases.errors(case)
        except AssertionError as error:  # a gradient that must not exist, or missing inputs
            found = {f"refused {error}": float("inf")}
        counts[kind] += 1
        for name, error in found.items():
            worst[kind][name] = max(worst[kind][name], (error, str(case)))
        if max(found.values()) > loss_cases.TOLERANCE[case["dtype"]]:
            failures.append((str(case), max(found.values())))
        if sum(counts.values()) % 200 == 0:
            print(sum(counts.values()), len(failures), file=sys.stderr, flush=True)
            jax.clear_caches()  # the programs are not used again, and would fill the memory
    factors = {name: len(values) for name, values in loss_cases.FACTORS.items()}
    print(f"factors and their numbers of values: {factors}; invalid combinations are left out")
    print(f"jax {jax.__version__}, {time.time() - started:.0f} s, errors relative to an array's")
    print("largest magnitude (for the loss: relative to the sum of |weight x value|)")
    for kind, count in counts.items():
        print(f"\n{' '.join(kind)}: {count} cases, tolerance {loss_cases.TOLERANCE[kind[1]]:g}")
        for name, (error, case) in worst[kind].items():
            print(f"  {name:<16} {error:.1e}  {case}")
    print(f"\n{sum(counts.values())} cases, {len(failures)} above their tolerance")
    for case, error in failures:
        print(f"  {error:.1e}  {case}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
