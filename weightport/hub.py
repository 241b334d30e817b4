"""Downloads from the Hugging Face Hub, through `huggingface_hub` and its cache."""

from __future__ import annotations

from pathlib import Path

from .converters.errors import ConversionError

_WEIGHTS = ("unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")
_CONFIGS = ("model_index.json", "*/config.json", "*/*.index.json")
_OTHERS = ("scheduler/*.json", "tokenizer/*.json", "tokenizer/merges.txt")
_VARIANTS = "*.*.safetensors"


def download_repo(repo_id: str, revision: str | None = None) -> Path:
    """The local folder of a diffusers repo: configs, tokenizer and the main safetensors files, nothing that runs.

    Raises:
        ConversionError: huggingface_hub is not installed, or the Hub does not give the repo.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ConversionError('a Hub id needs huggingface_hub; run `pip install "weightport[hub]"`') from None
    try:
        wanted = [*_WEIGHTS, *_CONFIGS, *_OTHERS]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=_VARIANTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"{repo_id}: cannot be downloaded from the Hub ({reason})") from None
