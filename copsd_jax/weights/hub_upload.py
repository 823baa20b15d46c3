"""Upload of an exported folder to the Hugging Face Hub, with the library huggingface_hub.

The library takes the token from HF_TOKEN or from its own file, and the address from HF_ENDPOINT.
No message contains the token.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors

from copsd_jax.weights import hub


def check_push(repository: str, public: bool) -> None:
    """Checks that a folder can be pushed to a repository; changes nothing on the hub.

    Args:
      repository: the repository id, owner/name.
      public: whether everybody may read the repository.

    Raises:
      ValueError: the id is wrong, or the repository exists with another visibility.
      ConnectionError: there is no token, or the hub cannot be reached or refuses the token.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)
        valid = hub.REPOSITORY_ID.fullmatch(repository)
    except huggingface_hub.errors.HFValidationError:
        valid = None
    if valid is None:
        raise ValueError(
            f"--push={repository}: write owner/name, the id of a repository, with letters, digits, "
            "'-', '_' and '.'"
        )
    if huggingface_hub.constants.is_offline_mode():
        raise ConnectionError(f"--push={repository}: the environment variable HF_HUB_OFFLINE is on")
    if not huggingface_hub.get_token():
        raise ConnectionError(
            f"--push={repository}: there is no token: set the environment variable HF_TOKEN, or "
            "run: hf auth login"
        )
    api = huggingface_hub.HfApi()
    with _explain_hub_errors(repository):
        api.whoami()
        try:
            private = api.repo_info(repository).private
        except huggingface_hub.errors.RepositoryNotFoundError:
            return
    if private == public:
        found, rule = ("private", "leave --public out") if private else ("public", "add --public")
        raise ValueError(f"--push={repository}: this repository exists and is {found}: {rule}")


def push_folder(folder: pathlib.Path, repository: str, public: bool, message: str) -> str:
    """Creates a repository if needed, and uploads a folder in one commit; returns the address.

    Args:
      folder: the folder.
      repository: the repository id, owner/name.
      public: whether everybody may read a new repository.
      message: the message of the commit.

    Raises:
      ConnectionError: the hub cannot be reached, or refuses the upload.
    """
    api = huggingface_hub.HfApi()
    with _explain_hub_errors(repository, f"; the export is complete in {folder}"):
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(address)


@contextlib.contextmanager
def _explain_hub_errors(repository: str, advice: str = "") -> Iterator[None]:
    """Turns each error of the library in the `with` block into a one-sentence ConnectionError."""
    try:
        yield
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise
    # The errors of the library and of its HTTP client have no common class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = re.sub("//[^/@ ]*@", "//", reason)
        if token := huggingface_hub.get_token():
            reason = reason.replace(token, "(the token)")
        address = re.sub("//[^/@]*@", "//", huggingface_hub.constants.ENDPOINT)
        raise ConnectionError(f"--push={repository}: {address} failed: {reason}{advice}") from error
