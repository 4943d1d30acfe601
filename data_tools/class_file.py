"""The file of class names that several commands take."""

from __future__ import annotations

from pathlib import Path

from fqgan_dist.credentials import holds_credentials
from fqgan_dist.errors import ConfigError


def read_classes(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read class names and their readable names, as in `n01443537<TAB>goldfish`.

    Raises:
        ConfigError: the file is missing, not text, empty, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"classes: {path} cannot be read ({error}); name a text file") from error
    rows = [line.partition("\t") for line in lines if line.strip()]
    classes = [name.strip() for name, _, _ in rows]
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(f"classes: {path}: expected at least one class and none of them twice")
    if holds_credentials("\n".join(lines)):
        raise ConfigError(
            f"classes: {path}: a name holds credentials, which datasets would spread; remove them"
        )
    return classes, {name.strip(): text.strip() for name, _, text in rows if text.strip()}
