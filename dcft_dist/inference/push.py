"""Sends the exported model of a finished run to a hub (huggingface.co, or another one that HF_ENDPOINT names)."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import Config
from ..errors import ConfigError, DataError, RunError, TemporaryError, line_of


def push_model(config: Config, model: Path, name: str, public: bool) -> str:
    """Uploads a folder with an exported model, its card included.

    Args:
        config: configuration of the run.
        model: the exported model.
        name: `owner/name` of the repository, which is made if it does not exist.
        public: whether a new repository can be read by everybody.

    Returns:
        Address of the uploaded version.

    Raises:
        RunError: the run is `private`.
        ConfigError: the name is none, or the hub refuses it or the token.
        TemporaryError: the hub cannot be reached.
        DataError: the package huggingface_hub is not installed.
    """
    if config.private:
        raise RunError(f"{config.name} is private (private = true in its configuration), so its model is not sent anywhere")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise DataError("dcft push needs the package huggingface_hub: pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        sent = api.upload_folder(repo_id=name, folder_path=model, commit_message=f"{config.name}, by dcft_dist")
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is not the name of a repository, such as my-lab/my-model: {line_of(error)}") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{api.endpoint} refuses {name}: {line_of(error)}. Log in with: hf auth login") from error
    except Exception as error:  # the client of the network is another one in each version
        if not (isinstance(error, OSError) or type(error).__module__.startswith("http")):
            raise
        raise TemporaryError(f"{api.endpoint} cannot be reached: {type(error).__name__}: {line_of(error)}") from error
    return str(sent.commit_url)
