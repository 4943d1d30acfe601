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


class PassingError(FqganError):
    """What was waited for in vain may come yet: the same command goes on, later (`waiting`)."""


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


class StorageOutageError(DataError, PassingError):
    """The storage did not answer, or its disk had no room, for longer than a run's patience."""


class NoCapacityError(ClusterError, PassingError):
    """The cluster did not have the resources of the workers for longer than a run's patience."""


class LossError(ClusterError, PassingError):
    """Processes or nodes were lost, without progress, for longer than a run's patience."""


class NoticeError(LossError):
    """A process or node was given notice that it will be ended; progress was saved before."""


class HangError(ClusterError, PassingError):
    """Ranks did not move for too long, and no one knew what they waited for."""


FAILED, TRY_AGAIN = 1, 75
"""Exit codes; 75 is EX_TEMPFAIL of sysexits.h."""


def exit_code_of(error: FqganError) -> int:
    """Give the exit code of a program that an error ends: 75 if the same command may go on."""
    return TRY_AGAIN if isinstance(error, PassingError) else FAILED
