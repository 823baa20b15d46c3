"""Dry runs of large models on TPU and GPU meshes; the devices need not be present.

    python benchmarks/compile_all.py > benchmarks/results/compile_all.txt

The script prints the report of each command, its exit code and its time in seconds. The dry runs
need libtpu and JAX's CUDA plugin, which `make compile-all` installs. For the GPU, ptxas must be on
PATH.
"""

import subprocess
import sys
import time

# Maximum lengths that suffice for mathematical problems. The presets have no evaluation, so these
# settings add one.
CAPS = (
    "--config.prompt.max_tokens=1024 --config.teacher.max_tokens=2048 "
    "--config.rollout.max_tokens=1024 --config.sampler.pack=1024 --config.eval.path=any "
    "--config.eval.max_tokens=4096 --config.eval.slots=128 --config.rollout.slots=128"
)
SMALL, LARGE = "configs/opsd.py:qwen3_1_7b", "configs/opsd.py:qwen3_8b_nothink"
# preset, devices, mesh and batch
RUNS = [
    (SMALL, "v5e:4x4", "--config.mesh.data=1 --config.mesh.fsdp=16"),
    (LARGE, "v5e:16x16", "--config.mesh.fsdp=32 --config.mesh.tensor=8 "
     "--config.train.micro_batch=32"),
    (LARGE, "v5p:4x4x4", "--config.mesh.fsdp=32 --config.mesh.tensor=2 "
     "--config.train.micro_batch=32"),
    (LARGE, "v5p:8x8x8", "--config.model.path=Qwen/Qwen3-32B --config.mesh.fsdp=64 "
     "--config.mesh.tensor=8 --config.train.batch=64 --config.train.micro_batch=64"),
    (LARGE, "2*v5e:16x16", "--config.mesh.data=2 --config.mesh.fsdp=32 --config.mesh.tensor=8 "
     "--config.train.batch=64 --config.train.micro_batch=64"),
    (SMALL, "cuda:h200:1x1", "--config.train.micro_batch=4"),
    # This run does not fit the devices.
    (LARGE, "v5e:2x2", "--config.train.trainable=full"),
]  # fmt: skip


def main() -> int:
    """Runs all commands; returns 0 if exactly the last run does not fit, else 1."""
    begun, codes = time.time(), []
    for card, target, settings in RUNS:
        arguments = [f"--config={card}", f"--dry_run={target}", *CAPS.split(), *settings.split()]
        print(f"$ python -m copsd_jax.main {' '.join(arguments)}", flush=True)
        start = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "copsd_jax.main", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout, end="")
        reported = done.stdout.startswith(("fits: ", "does not fit: "))
        if not reported:
            print(done.stderr[-2000:])
        codes.append(done.returncode if reported else -1)
        print(f"exit code {done.returncode}, {time.time() - start:.0f} s\n", flush=True)
    print(f"all in {(time.time() - begun) / 60:.1f} minutes")
    return 0 if codes == [0] * (len(RUNS) - 1) + [1] else 1


if __name__ == "__main__":
    sys.exit(main())
