"""Upload a verified export with its model card to the Hugging Face hub."""

from __future__ import annotations

from qatkit.errors import QatkitError
from qatkit.pipeline.verify import read_verification
from qatkit.run.exports import Exported
from qatkit.run.folder import Run


def push_export(run: Run, exported: Exported, repository: str, private: bool) -> str:
    """Upload the folder of an export, and return the address of the commit.

    Args:
        run: The run.
        exported: The export.
        repository: ``OWNER/NAME`` on the hub; it is created if it does not exist.
        private: Whether a new repository is private.

    Raises:
        QatkitError: the file has not been verified, failed verification or has changed since; there is no token; or the
            hub refuses the upload.
    """
    from huggingface_hub import HfApi, get_token

    if not read_verification(run, exported)["passed"]:
        raise QatkitError(
            f"'{exported.name}' failed verification, so it is not uploaded",
            key=str(exported.path), advice=f"run `qatkit verify {run.out}` to see why",
        )  # fmt: skip
    if get_token() is None:
        raise QatkitError(
            "there is no token for the hub", key="REPOSITORY", advice="run `hf auth login`, or set HF_TOKEN"
        )
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=exported.folder, commit_message=f"{run.recipe.name}: {exported.name}"
        )
    except Exception as error:  # errors of the HTTP library and of the hub share no base class
        reason = str(error).strip().splitlines()[0]
        raise QatkitError(
            f"'{repository}' cannot be written: {reason}", key="REPOSITORY",
            advice="check the name, and that the token may write to it",
        ) from error  # fmt: skip
    return str(commit.commit_url)
