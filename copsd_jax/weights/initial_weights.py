"""Weights from which a new run starts instead of the weights of model.path (`model.init_from`).

The setting names a folder of one of three kinds:

    a work directory of a run   the trained weights of its newest checkpoint; W/checkpoints/12 names
                                the checkpoint of step 12
    a PEFT folder               an adapter
    a Hugging Face folder       a model with the shape of model.path

The policy with these weights is the initial policy of the new run. The settings
teacher.weights=fixed, teacher.weights=trust_region and policy.kl refer to this initial policy. If a
run starts from an adapter, the State keeps this adapter as the frozen adapter of the initial policy
(see `train_step.State`).
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from copsd_jax.model import lora, transformer
from copsd_jax.runtime import checkpoint, nonfinite, sharding, workdir
from copsd_jax.weights import hf, hf_config, peft

# The settings that determine the weights of a model with random weights.
DRAWN_BY = ("seed", "model.init", "model.shape", "model.dtype")
# A function that takes a tree, and returns the shardings of its leaves.
FindShardings = Callable[[Any], Any]


class Source(NamedTuple):
    """The folder that `model.init_from` names.

    Attributes:
      kind: "run" (a checkpoint of a work directory), "adapter" (PEFT) or "model" (Hugging Face).
      folder: the folder; for a run, the folder of the checkpoint.
      settings: the settings of the run by name; {} for the kinds "adapter" and "model".
    """

    kind: str
    folder: pathlib.Path
    settings: Mapping[str, Any]

    @property
    def is_adapter(self) -> bool:
        """True if the folder contains an adapter instead of a whole model."""
        return self.kind == "adapter" or self.settings.get("train.trainable") == "lora"


def refuse(source: Source, rule: str) -> NoReturn:
    """Raises a ValueError that names the setting, the folder, and the broken rule."""
    raise ValueError(f"model.init_from is {str(source.folder)!r}: {rule}")


def resolve_initial_weights(path: str) -> str:
    """Returns the newest checkpoint's folder for a work directory; returns other paths unchanged.

    Raises:
      ValueError: the work directory has no checkpoint.
    """
    folder = pathlib.Path(os.path.expanduser(path)) / "checkpoints"
    if not path or not folder.is_dir():
        return path
    with checkpoint.Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"model.init_from is {path!r}: the run has no checkpoint yet")
    return f"{path.rstrip('/')}/checkpoints/{steps[-1]}"


def find_source(path: str) -> Source | None:
    """Returns the `Source` that `model.init_from` names; returns None for "".

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the folder is of none of the three kinds, or a work directory has no checkpoint.
    """
    if not path:
        return None
    folder = pathlib.Path(os.path.expanduser(resolve_initial_weights(path)))
    if not folder.is_dir():
        raise FileNotFoundError(f"model.init_from is {path!r}: there is no such folder")
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        return Source("run", folder, workdir.read_all_settings(folder.parent.parent))
    for kind, file in (("adapter", peft.CONFIG), ("model", "config.json")):
        if (folder / file).is_file():
            return Source(kind, folder, {})
    raise ValueError(
        f"model.init_from is {path!r}: it is neither a work directory with checkpoints, nor a PEFT "
        f"folder with {peft.CONFIG}, nor a Hugging Face folder with config.json"
    )


def keeps_adapter(path: str, trainable: str) -> bool:
    """Returns whether a run's initial policy has an adapter; if so, the run keeps this adapter."""
    source = find_source(path) if trainable == "lora" else None
    return source is not None and source.is_adapter


# ---- checks ----------------------------------------------------------------------------------


def check_source(
    source: Source | None, settings: Mapping[str, Any], shape: transformer.ModelConfig,
    base: pathlib.Path,
) -> None:  # fmt: skip
    """Refuses weights that do not fit the run; reads only headers and the values of a tied head.

    Args:
      source: the folder to start from.
      settings: the settings of the new run by name.
      shape: the shape of the model.
      base: the file or folder of the weights of model.path.

    Raises:
      ValueError, OSError: the weights do not fit, or a file is missing or damaged.
    """
    if source is None:
        return
    lora_run = settings["train.trainable"] == "lora"
    if source.kind == "model":
        own = hf_config.load_config(source.folder)
        for name, value in vars(shape).items():
            if getattr(own, name) != value:
                refuse(source, f"its model has {name}={getattr(own, name)}, not {value}")
        hf.check_weights(source.folder, shape)
        return
    if source.is_adapter and lora_run:
        if settings["teacher.weights"] == "ema" and settings["policy.kl"] > 0:
            refuse(source, "with policy.kl, teacher.weights must not be 'ema', because a run keeps "
                   "only one adapter besides the trained adapter; use 0 as policy.kl")  # fmt: skip
        targets, rank, alpha = _describe_adapter(source, shape)
        given = {"lora.targets": sorted(targets), "lora.rank": rank, "lora.alpha": alpha}
        for name, value in given.items():
            own = settings[name]
            if (sorted(own) if name == "lora.targets" else own) != value:
                refuse(source, f"its adapter has {name}={value}, but the run has {own}")
    if source.kind == "adapter":
        if not lora_run:
            refuse(source, "an adapter needs train.trainable=lora; for train.trainable=full, merge "
                   "it into its model, and name the folder of the merged model")  # fmt: skip
        return
    tree = _trained_shapes(source, shape)
    with checkpoint.Checkpoints(source.folder.parent) as checkpoints:
        try:
            checkpoints.check_part(int(source.folder.name), "trained", tree)
        except checkpoint.DamagedCheckpoint as error:
            others = [step for step in checkpoints.steps() if step != int(source.folder.name)]
            raise ValueError(
                f"model.init_from is {str(source.folder)!r}: {error}; the run also has "
                f"checkpoints of the steps {others}"
            ) from error
    if source.is_adapter:
        _check_base(source, settings, base)


def _describe_adapter(
    source: Source, shape: transformer.ModelConfig
) -> tuple[Iterable[str], int, float]:
    """Returns the targets, the rank and the alpha of an adapter."""
    if source.kind == "adapter":
        found = peft.open_adapter(source.folder, shape)
        return found.targets, found.rank, found.alpha
    s = source.settings
    return s["lora.targets"], s["lora.rank"], s["lora.alpha"]


def _check_base(source: Source, settings: Mapping[str, Any], base: pathlib.Path) -> None:
    """Refuses a run's adapter if the adapter was trained on other base weights."""
    try:
        start = workdir.read_starts(source.folder.parent.parent / "run.json")[0]
    except ValueError as error:
        refuse(source, f"{error}: restore this file from a copy")
    own = fingerprint_base(None, base, settings["model.init"])
    if (theirs := start.get("model_fingerprint", own)) != own:
        refuse(source, f"the base weights of its adapter have the fingerprint {theirs[:12] or None}"
               f", but the weights of model.path have {own[:12] or None}")  # fmt: skip
    for name in () if own else DRAWN_BY:
        was, now = source.settings[name], settings[name]
        if was != now and "auto" not in (was, now):  # auto may stand for either dtype
            refuse(source, f"the base weights of its adapter were drawn with {name}={was!r}, but "
                   f"the run has {now!r}")  # fmt: skip


# ---- fingerprints ----------------------------------------------------------------------------


def fingerprint_base(source: Source | None, base: pathlib.Path, init: str) -> str:
    """Returns a fingerprint of the base weights of a run; "" for random weights.

    Args:
      source: the folder that the run starts from, if any.
      base: the file or folder of the weights of model.path.
      init: the value of model.init.
    """
    if source is not None and not source.is_adapter:
        return fingerprint_source(source)
    return "" if init == "random" else hf.fingerprint_weight_files(base)


def fingerprint_source(source: Source | None) -> str:
    """Returns one SHA-256 of the files to start from; "" for no source.

    The hash covers the name, size, first MiB and last MiB of every file.
    """
    if source is None:
        return ""
    if source.kind == "model":
        return hf.fingerprint_weight_files(source.folder)
    files = sorted(path for path in source.folder.rglob("*") if path.is_file())
    hashes = [hf.fingerprint_weight_files(path) for path in files]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


# ---- loading ---------------------------------------------------------------------------------


def load_initial(
    source: Source | None, path: str, load_base: Callable[..., dict],
    shape: transformer.ModelConfig, dtype: Any, trainable: str, find_shardings: FindShardings,
) -> tuple[dict, dict | None]:  # fmt: skip
    """Loads the base parameters and the initial trained tree; checks that all numbers are finite.

    Args:
      source: the folder to start from, or None.
      path: the value of model.path, for messages.
      load_base: function that loads base parameters: `load_base()` loads the parameters of
        model.path, and `load_base(folder)` loads the parameters of a Hugging Face folder.
      shape: the shape of the model.
      dtype: dtype of the base parameters.
      trainable: lora or full.
      find_shardings: function that returns the shardings of a tree.

    Returns:
      The base parameters, and the trained tree in float32: an adapter or all parameters. If the
      trained tree is None, the run trains a new adapter or a copy of the base parameters.

    Raises:
      checkpoint.UnusableCheckpoint: the folder to start from was damaged after it was checked.
      NonFinite: a number is NaN or infinite; the message names the setting for these weights.
    """

    def own() -> dict:
        return _check_numbers(load_base(), f"model.path is {path!r}")

    if source is None:
        return own(), None
    name = f"model.init_from is {str(source.folder)!r}"
    if source.kind == "model":
        with _explain_initial_weight_errors(name):
            tree = load_base(source.folder)
        return _check_numbers(tree, name), None
    if source.kind == "adapter":
        with _explain_initial_weight_errors(name):
            tree = peft.open_adapter(source.folder, shape).read()
        tree = jax.tree.map(sharding.shard_array, tree, find_shardings(tree))
        return own(), _check_numbers(tree, name)
    like = _trained_shapes(source, shape)
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like, find_shardings(like),
    )  # fmt: skip
    with checkpoint.Checkpoints(source.folder.parent) as checkpoints:
        trained = checkpoints.load_part(int(source.folder.name), "trained", like)
    _check_numbers(trained, name)
    if source.is_adapter and trainable == "lora":
        return own(), trained
    if source.is_adapter:
        scale = source.settings["lora.alpha"] / source.settings["lora.rank"]
        base = own()
        trained = jax.jit(
            _merge_initial_adapter, static_argnums=2, out_shardings=find_shardings(base)
        )(base, trained, scale)
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree),
                   out_shardings=find_shardings(trained))  # fmt: skip
    base = _check_numbers(cast(trained), name)
    return base, trained if trainable == "full" else None


@contextlib.contextmanager
def _explain_initial_weight_errors(name: str) -> Iterator[None]:
    """Adds the name of the setting to errors in the files of the initial weights."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise checkpoint.UnusableCheckpoint(f"{name}: {error}") from error


def _check_numbers(tree: dict, owner: str) -> dict:
    nonfinite.check_finite(tree, owner)
    return tree


def _merge_initial_adapter(base: dict, adapter: dict, scale: float) -> dict:
    """Merges an adapter into base parameters; computes in float32."""
    return lora.merge_adapter(jax.tree.map(lambda x: x.astype(jnp.float32), base), adapter, scale)


def _trained_shapes(source: Source, shape: transformer.ModelConfig) -> dict:
    """Returns the abstract trained tree of the run in a work directory."""
    s = source.settings
    if not source.is_adapter:
        return transformer.abstract_params(shape, jnp.float32)
    return jax.eval_shape(
        lambda: lora.init_adapter(shape, s["lora.rank"], s["lora.targets"], jax.random.key(0))
    )
