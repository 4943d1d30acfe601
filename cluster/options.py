"""Options and exit codes of `cluster/submit`; command.py says what they mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from fqgan_dist.config import Config, parse_config
from fqgan_dist.credentials import holds_credentials, is_secret_name, scrub
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def _check_folder(text: str) -> str:
    if is_remote(text):
        return text  # Ray's own: it knows more schemes than the runs do
    folder = os.path.expanduser(text)
    if not Path(folder).exists():
        raise ValueError(f"there is no folder {text!r} to send along")
    return folder


def _check_variable(name: str) -> str:
    if is_secret_name(name):
        raise ValueError(
            f"{name!r} looks like a credential, and a job's variables are shown on the dashboard; "
            f"give the nodes a role instead (cluster/README.md)"
        )
    if name not in os.environ:
        raise ValueError(f"{name!r} is not set in this shell; export it first")
    # A proxy or endpoint may have its password in its address.
    if scrub(os.environ[name]) != os.environ[name]:
        raise ValueError(
            f"the value of {name!r} holds credentials ({scrub(os.environ[name])}), and a job's "
            "variables are shown on the dashboard; leave them out of it, or give the nodes what "
            "needs none (cluster/README.md)"
        )
    return name


def _check_command(command: Sequence[str]) -> None:
    for word in command:
        if holds_credentials(word):
            raise ConfigError(
                f"the command holds credentials ({word}), and a job's command is shown on the "
                "dashboard and in its log; give the nodes a role instead (cluster/README.md)"
            )


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
    patience_s: float = Field(default=86400.0, ge=0, allow_inf_nan=True)
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
    _check_command(command)
    values = {name: value for name, _, value in (text.partition("=") for text in options)}
    return parse_config(values, Settings, source="cluster/submit"), command
