"""Share calibration files through the Hugging Face hub, with its own client."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ertacache.errors import CalibrationError
from ertacache.schema import MAX_FILE_BYTES, printable

if TYPE_CHECKING:
    from ertacache.calibration import Bundle, Calibration

NAME_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*"
REPOSITORY = re.compile(rf"{NAME_PART}/{NAME_PART}")
FILE_NAME = re.compile(rf"({NAME_PART}/)*{NAME_PART}\.json")


def _client() -> Any:
    """The hub's client; raises CalibrationError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise CalibrationError("the hub's client is not installed: pip install huggingface_hub") from None
    return huggingface_hub


def push(
    calibration: "Calibration | Bundle",
    repo_id: str,
    filename: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload a calibration to a model repository, and return the address of the commit or pull request.

    Args:
        repo_id: user/name; created if needed.
        filename: a plain path in the repository that ends in .json.
        token: of the hub account; default: that of `hf auth login`.
        private: whether a new repository is private; None: the account's default.
        create_pr: open a pull request, for somebody else's repository, which has to exist.
        endpoint: address of another hub.

    Raises CalibrationError: the names are not allowed, or the hub refuses.
    """
    huggingface_hub = _client()

    from ertacache.calibration import to_json

    check_names(repo_id, filename)
    data = to_json(calibration.to_dict()).encode()
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="ertacache")
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=data,
            path_in_repo=filename,
            repo_id=repo_id,
            commit_message=f"ERTACache calibration {filename}",
            create_pr=create_pr,
        )
    except Exception as error:  # the client raises its own kinds and those of its transport
        raise _refused(f"cannot upload {filename} to {repo_id}", error) from error
    return commit.pr_url or commit.commit_url


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download `filename` of the model repository `repo_id` into the hub's cache, or find it there.

    Args as for `push`, and:
        revision: a branch, tag or commit; a commit gives the same file every time.
        cache_dir: folder of the cache; the hub's own by default.

    Returns:
        The path of the cached file, which is not validated yet.

    Raises CalibrationError: the names are not allowed, there is no such file, or it is too large.
    """
    huggingface_hub = _client()
    from huggingface_hub import constants  # where the client is, this is

    check_names(repo_id, filename)
    common: dict[str, Any] = {"revision": revision, "endpoint": endpoint}
    try:
        if not constants.HF_HUB_OFFLINE:
            url = huggingface_hub.hf_hub_url(repo_id, filename, **common)
            size = huggingface_hub.get_hf_file_metadata(url, token=token).size
            if size is not None and size > MAX_FILE_BYTES:
                raise CalibrationError(f"{filename} of {repo_id} has {size} bytes: not a calibration, not downloaded")
        found = huggingface_hub.hf_hub_download(repo_id, filename, token=token, cache_dir=cache_dir, **common)
    except CalibrationError:
        raise
    except Exception as error:
        raise _refused(f"cannot download {filename} of {repo_id}", error) from error
    inside = Path(cache_dir or constants.HF_HUB_CACHE).resolve()
    if not Path(found).resolve().is_relative_to(inside):
        raise CalibrationError(f"{filename} of {repo_id} leads out of the cache {inside}: refused")
    return Path(found)


def check_names(repo_id: str, filename: str) -> None:
    """Raise CalibrationError unless the names are plainly a repository and a JSON file in it."""
    if not isinstance(repo_id, str) or not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise CalibrationError(f"repository {printable(repr(repo_id))} must be named like user/name")
    if not isinstance(filename, str) or not FILE_NAME.fullmatch(filename) or ".." in filename:
        raise CalibrationError(
            f"file {printable(repr(filename))} must be a plain name ending in .json, such as flux-dev/28-2x.json"
        )


def _refused(what: str, error: Exception) -> CalibrationError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CalibrationError(f"{what} ({printable(first)})")
