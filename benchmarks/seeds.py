"""Runs a card with several seeds, and prints the gain with its confidence interval.

    python benchmarks/seeds.py --config=configs/opsd.py --seeds=0,1,2 [--config.a.b=value ...]

Each seed has its own adapter, data order and rollouts. The held-out problems are the same, so each
problem's scores are averaged over the seeds before problems are resampled. The script prints a
table, and one JSON line per group of problems for benchmarks/results/.
"""

import argparse
import json
import pathlib
import shutil
import sys

import numpy as np

from copsd_jax import main as main_lib
from copsd_jax import train
from copsd_jax.metrics import eval_tables, scoring, terminal
from copsd_jax.runtime import evaluation_files


def load(directory: pathlib.Path) -> tuple[dict, dict]:
    """Returns the first and the last evaluation of a finished run."""
    files = sorted((directory / "eval").glob("step_*.json"))
    return evaluation_files.read_evaluation(files[0]), evaluation_files.read_evaluation(files[-1])


def shares(result: dict) -> dict[str, dict[str, float]]:
    """Returns {group: {problem: share of correct samples}}."""
    return {
        name: {p["id"]: scoring.avg_at_n([s["correct"] for s in p["samples"]]) for p in part}
        for name, part in eval_tables.group_records(result["problems"]).items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="runs/seeds")
    args, rest = parser.parse_known_args()
    card = pathlib.Path(args.config.partition(":")[0]).stem
    directories: list[pathlib.Path] = []
    for seed in args.seeds.split(","):
        directory = pathlib.Path(args.out) / f"{card}-{seed}"
        argv = ["main", f"--config={args.config}", f"--workdir={directory}", *rest]
        config, *_ = main_lib.parse_command([*argv, f"--config.seed={seed}"])
        plan, continued = train.prepare(config, directory)
        if directories and not continued and config.eval.temperature == 0:
            # The greedy answers of the initial policy do not depend on the seed.
            (directory / "eval").mkdir(parents=True)
            shutil.copy(directories[0] / "eval" / "step_000000.json", directory / "eval")
        train.train(plan, directory, continued)
        directories.append(directory)
    pairs = [tuple(map(shares, load(directory))) for directory in directories]
    rows = []
    for name, problems in pairs[0][0].items():
        before, after = (
            [float(np.mean([pair[side][name][i] for pair in pairs])) for i in problems]
            for side in (0, 1)
        )
        gains = [
            float(np.mean([new[name][i] - old[name][i] for i in problems])) for old, new in pairs
        ]
        paired = scoring.compare_paired_scores(before, after)
        line = {
            "config": args.config, "settings": rest, "seeds": args.seeds, "group": name,
            "problems": len(problems), "before": float(np.mean(before)),
            "after": float(np.mean(after)), "difference": paired.difference, "low": paired.low,
            "high": paired.high, "p": paired.p, "gain_of_each_seed": gains,
        }  # fmt: skip
        print(json.dumps(line))
        rows.append(
            [name, len(problems), f"{np.mean(before):.1%}", f"{np.mean(after):.1%}",
             f"{paired.difference * 100:+.1f}",
             f"[{paired.low * 100:+.1f}, {paired.high * 100:+.1f}]",
             " ".join(f"{gain * 100:+.1f}" for gain in gains)]
        )  # fmt: skip
    headers = ["problems", "n", "before", "after", "points", "95 % interval", "each seed"]
    print(terminal.table(headers, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
