"""How every command ends: the error as a line, and the exit code that says what kind it is."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fqgan_dist.errors import FAILED, ConfigError, FqganError, exit_code_of
from fqgan_dist.storage.disk_errors import explain_if_of_disk
from fqgan_dist.terminal import write_error
from fqgan_dist.termination import EXIT_CODE, TerminatedError, clean_termination

DONE, WRONG_USAGE, DAMAGE_FOUND = 0, 2, 3
"""Exit codes, beside those of `errors` and `termination`."""


def carry_out(command: Callable[[], int]) -> int:
    """Carry out a command and return its exit code; no error of a user's has a traceback."""
    try:
        with clean_termination():
            return command()
    except ConfigError as error:
        write_error(error)
        return WRONG_USAGE
    except FqganError as error:
        write_error(error)
        return exit_code_of(error)
    except OSError as error:
        explained = explain_if_of_disk(error)
        if not isinstance(explained, FqganError):
            raise
        write_error(explained)
        return exit_code_of(explained)
    except TerminatedError:
        sys.stderr.write("terminated; the same command continues\n")
        return EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        return FAILED
