"""A converted folder to a model hub."""

from __future__ import annotations

from pathlib import Path

from lejepa_scale.errors import UserError


def push(folder: Path, repository: str) -> str:
    """Upload what `convert` wrote, into a repository that is made where it is not there; its address. The token is
    huggingface_hub's own (`hf auth login`, HF_TOKEN), the hub HF_ENDPOINT. Raises UserError where that fails; the folder
    stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        address = str(api.create_repo(repository, repo_type="model", exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="lejepa convert")
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the hub, of the system, of whichever HTTP library it uses
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--push {repository}: {reason.rstrip('.')}. {folder} is written; log in with `hf auth login` (or set HF_TOKEN) "
            f"and upload it with `hf upload {repository} {folder}`."
        ) from error
    return address
