"""What a user sees of an error that is the user's to repair."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator

from dinoengine.data import DataError
from dinoengine.engine.torchrun import process_rank
from dinoengine.utils.printable import printable_lines

_SECONDS_FOR_RANK_0 = 3


@contextlib.contextmanager
def exit_on_user_error(*errors: type[Exception]) -> Iterator[None]:
    """An error of the user's becomes one message and exit code 2; the traceback goes to log.txt.

    Wrong names, missing files, weights that do not fit: the message says what to do, and a traceback would bury it.

    Args:
        errors: types that are the user's; none: those of setting up a run (ValueError, KeyError, OSError, DataError).
    """
    expected = errors or (ValueError, KeyError, OSError, DataError)
    try:
        yield
    except BrokenPipeError:  # an OSError that no user made: see utils.console
        raise
    except expected as error:
        logging.getLogger("dinoengine").debug("Stopped by an error", exc_info=True)
        rank, message = process_rank(), printable_lines(str(error))
        if rank == 0:
            print(f"error: {message}", file=sys.stderr)
        else:
            # Rank 0 mostly fails with the same message, and its end ends this process. What is left after a moment is
            # an error of this rank alone.
            time.sleep(_SECONDS_FOR_RANK_0)
            print(f"error on rank {rank} ({socket.gethostname()}): {message}", file=sys.stderr)
        raise SystemExit(2) from None
