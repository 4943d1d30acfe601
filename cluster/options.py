"""Options and exit codes of `cluster/submit`; command.py says what they mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from fqgan_dist.config import Config, parse_config
from fqgan_dist.credentials import SECRET_NAME
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def _check_folder(text: str) -> str:
    if not is_remote(text) and not Path(text).exists():
        raise ValueError(f"there is no folder {text!r} to send along")
    return text


def _check_variable(name: str) -> str:
    if SECRET_NAME.search(name):
        raise ValueError(
            f"{name!r} looks like a credential, and a job's variables are shown on the dashboard; "
            f"give the nodes a role instead (cluster/README.md)"
        )
    if name not in os.environ:
        raise ValueError(f"{name!r} is not set in this shell; export it first")
    return name


class Settings(Config):
    """The options before `--`; cluster/command.py says what they are."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    address: str | None = None
    working_dir: Annotated[str, AfterValidator(_check_folder)] | None = None
    env: Annotated[
        tuple[Annotated[str, AfterValidator(_check_variable)], ...],
        BeforeValidator(lambda text: [name for name in text.split(",") if name]),
    ] = Field(default=(), validate_default=False)
    max_losses: int = Field(default=20, ge=0)
    head_wait_s: float = Field(default=3600.0, ge=0, allow_inf_nan=True)
    poll_s: float = Field(default=15.0, ge=0)


def parse_arguments(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """Part the options from the command.

    Raises:
        ConfigError: there is no command, or every problem of the options.
    """
    options = [*arguments[: arguments.index("--")]] if "--" in arguments else [*arguments]
    command = [*arguments[len(options) + 1 :]]
    if not command:
        raise ConfigError("no command: expected `-- fqgan run CONFIG ...` after the options")
    values = {name: value for name, _, value in (text.partition("=") for text in options)}
    return parse_config(values, Settings, source="cluster/submit"), command
