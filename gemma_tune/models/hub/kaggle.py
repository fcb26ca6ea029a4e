"""Gemma from Kaggle, through its own client `kagglehub` (the extra `kaggle`), which caches and resumes itself."""

import importlib.util
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.directory import check_directory
from gemma_tune.models.resolve import KAGGLE_HANDLE


def download_kaggle_model(handle: str) -> Path:
    """Download a handle such as `google/gemma/transformers/2b-it`; returns the model's directory.

    Raises:
        ModelError: another framework's files, no kagglehub, refused by Kaggle, or not a whole Gemma.
    """
    found = KAGGLE_HANDLE.fullmatch(handle)
    if found is None:
        raise ModelError(f"{handle!r} is no Kaggle handle", hint="owner/model/transformers/variation[/version]")
    if found["framework"].lower() != "transformers":
        raise ModelError(
            f"{handle} holds files for {found['framework']}, which transformers does not read",
            hint=f"take the transformers variation: {found['page']}/transformers/{found['variation']}",
        )
    if importlib.util.find_spec("kagglehub") is None:
        raise ModelError(
            f"{handle} is on Kaggle, and its client kagglehub is not installed", hint="pip install 'kagglehub>=1,<2'"
        )
    import kagglehub

    try:
        directory = Path(kagglehub.model_download(handle))
    except Exception as error:
        # kagglehub lets through what its network stack raises, beside several kinds of its own.
        raise _refused(handle, found["page"], error) from None
    check_directory(directory)
    return directory


def _refused(handle: str, page: str, error: Exception) -> ModelError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    address = f"https://www.kaggle.com/models/{page}"
    if status in (401, 403) or type(error).__name__ in ("CredentialError", "UnauthenticatedError"):
        return ModelError(
            f"Kaggle does not let this machine read {handle}: {said}",
            hint=f"accept the licence at {address}; then log in: kagglehub.login(), or KAGGLE_USERNAME and KAGGLE_KEY",
        )
    if status == 404:
        return ModelError(f"Kaggle has no {handle}", hint=f"the variations are listed at {address}")
    return ModelError(f"{handle} cannot be downloaded from Kaggle: {said}", hint="connect and try again")
