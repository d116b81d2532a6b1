"""Models on the Hugging Face hub: what is fetched of them, and what is said where that fails."""

import re
from collections.abc import Iterable
from pathlib import Path

from astraea_jax.checks import Refusal

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What a model is called there: `owner/name`."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A revision that stays what it is."""

JSON = (
    *("model_index.json", "config.json", "*/config.json", "scheduler/scheduler_config.json"),
    *("*/tokenizer_config.json", "*.safetensors.index.json"),
    *("astraea.json", "captions.json", "schedules/*.json"),
)
"""What says which model it is and where its weights are: fetched first."""


def fetch(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Fetches the files of a model that match a pattern; returns the folder that holds them.

    What is there already is not fetched again, and where the hub can't be reached, the local cache
    stands in for it.

    Args:
      name: `owner/name`.
      patterns: in them `*` matches any letters, those of folders too.
      revision: a branch, a tag or a commit; None is the main branch.

    Raises:
      Refusal: the hub has no such model or revision, does not let the user have it, or can't be
        reached.
    """
    import huggingface_hub  # slow to import, and most models are local

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # a dozen classes of several libraries
        raise Refusal(f"can't fetch {name} from the hub: {_said(name, revision, error)}") from error


def _said(name: str, revision: str | None, error: Exception) -> str:
    """Why it can't be had, and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its licence at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such model, or it is private: check the name; for a private one, run "
            "`hf auth login` first"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}: name a branch, tag or commit of {page}/commits"
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "the hub can't be reached, and the files are not in the local cache: go online, or "
            f"download the model elsewhere and pass its folder ({reason})"
        )
    return f"{reason}; check the network, or download the model and pass its folder"
