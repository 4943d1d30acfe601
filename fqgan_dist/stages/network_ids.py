"""Frozen networks are the same on every node, or the work stops."""

from __future__ import annotations

from fqgan_dist.errors import DataError


class NetworkIds:
    """What the networks of some work are, by name; filled where the work is made.

    It travels with the work: a path to weights may name another file on another node, and chunks
    made with that one would carry the id of this one without a sound.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def confirm(self, name: str, identity: str) -> None:
        """Note what a network was loaded as, or compare it with what was noted before.

        Raises:
            DataError: it is another one than where the work was made.
        """
        known = self._known.setdefault(name, identity)
        if known != identity:
            raise DataError(
                f"{name}: the network loaded on this node is {identity!r} - expected {known!r}, "
                f"that of the driver - give every node the same weights file (best an s3:// URI), "
                f"or set its weights.sha256"
            )
