"""Exception types; every message says what is wrong, what was expected, what to change."""

from __future__ import annotations

from fqgan_dist.terminal import clean_text


class FqganError(Exception):
    """Base of every error that a user can cause or must act upon.

    Messages quote files, settings and other packages' errors, and go to terminals, logs and other
    processes: they are made fit for all of them here.
    """

    is_clean = True
    """For logs, see `terminal`: the message may have several lines."""

    def __init__(self, message: str = "") -> None:
        super().__init__(str(clean_text(str(message))))


class ConfigError(FqganError):
    """A setting, or the command line, is wrong; the message lists every problem found."""


class DataError(FqganError):
    """A dataset, shard, sample or stage output is missing, damaged or not the one expected."""


class CheckpointError(FqganError):
    """A checkpoint is missing, damaged, of another architecture, or written by a newer attempt."""


class ClusterError(FqganError):
    """The cluster cannot run the job: resources, reachability or storage differ between nodes."""


class NumericsError(FqganError):
    """A loss, gradient or statistic is not finite or breaks an invariant."""
