"""Reads that a file system refuses for a while: tried again a few times, with growing pauses."""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # half a minute: far below `launch.timeout_s`, within which the other ranks wait
_PASSING = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
}  # fmt: skip


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of a disk or a network that may be back in a moment."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError)) or (isinstance(error, OSError) and error.errno in _PASSING):
            return True
        error = error.__cause__ or error.__context__
    return False


def patiently(
    read: Callable[[], T],
    what: str,
    *,
    again: Callable[[BaseException], bool] = may_pass,
    pauses_s: Sequence[float] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """`read()`, once more after each pause (`PAUSES_S`) as long as it raises what `again` finds worth it; then that is raised."""
    for pause in PAUSES_S if pauses_s is None else pauses_s:
        try:
            return read()
        except Exception as error:
            if not again(error):
                raise
            log.warning("%s: %s: again in %g s", what, str(error).strip() or type(error).__name__, pause)
        sleep(pause)
    return read()
