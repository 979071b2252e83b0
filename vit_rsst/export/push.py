"""Uploads an export folder, or a ticket with a card, to the Hub. The only module that uploads anything."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from vit_rsst import files
from vit_rsst.errors import InputError, MissingRequirement, first_line
from vit_rsst.export import card
from vit_rsst.export.deployed import READERS
from vit_rsst.export.work import Work
from vit_rsst.text import size
from vit_rsst.tickets import ticket_file

NOT_REACHED = HfHubHTTPError.__bases__
"""Errors of huggingface_hub's HTTP client, which depends on its version."""


def push(what: Path, repo: str, public: bool = False, dry_run: bool = False) -> str:
    """Uploads; returns a listing of what was, or with `dry_run` would be, uploaded.

    Raises:
        InputError: not a repository id, not an export folder, or a repository with the other visibility.
        MissingRequirement: no token, no network, or the Hub rejects the upload.
        Damaged: the ticket cannot be read.
    """
    _check_repo(repo)
    with _prepared(what, repo) as folder:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(folder)!s:28}{size(path.stat().st_size)}" for path in paths]
        visibility = "public" if public else "private"
        if dry_run:
            return "\n".join([f"would upload to {repo} ({visibility}); nothing was sent", *lines])
        return "\n".join([f"uploaded to {_upload(folder, repo, public)} ({visibility})", *lines])


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"REPO: {repo!r} is not a repository id; give OWNER/NAME or NAME ({error}).") from error


@contextlib.contextmanager
def _prepared(what: Path, repo: str) -> Iterator[Path]:
    """The folder to upload; for a ticket, a temporary one with its card."""
    if what.is_dir():
        if not (what / "README.md").is_file() or not any((what / n).is_file() for n in ("config.json", *READERS)):
            raise InputError(
                f"{what}: not an export folder (needs README.md and a model); run `vit-rsst export` first."
            )
        yield what
        return
    work = Work.of(what)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ticket_file.save(folder / what.name, work.net.state_dict(), work.trained.mask, work.header)
        files.write_text(folder / "README.md", card.of_ticket(work, repo.rpartition("/")[2]))
        yield folder


def _upload(folder: Path, repo: str, public: bool) -> str:
    """Creates the repository if needed and uploads one commit; returns its URL."""
    if constants.HF_HUB_OFFLINE:
        raise MissingRequirement("push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.")
    if get_token() is None:
        raise MissingRequirement("push: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="vit_rsst")
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        _check_visibility(api.repo_info(address.repo_id).private, repo, public)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload by vit-rsst push")
    except HfHubHTTPError as error:
        raise MissingRequirement(
            f"push: the Hub rejects {repo} ({first_line(error)}); check the name and the token's permissions."
        ) from error
    except NOT_REACHED as error:
        raise MissingRequirement(f"push: cannot reach the Hub ({first_line(error)}); try again online.") from error
    return str(address)


def _check_visibility(is_private: bool, repo: str, public: bool) -> None:
    """An existing repository keeps its visibility, so it must match."""
    if is_private == public:
        found, way = ("private", "omit --public") if is_private else ("public", "pass --public")
        raise InputError(f"REPO: {repo} already exists and is {found}; {way}, change it on the Hub, or use another.")
