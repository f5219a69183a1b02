"""One process writes into an OUTPUT_DIR: a lock that says who has it, and that does not outlive its holder.

The lock is an flock on ``OUTPUT_DIR/.lock``, which the system frees when the process ends, however it ends. Two machines
may share a file system without sharing its flocks, or it has none. For them the file says which process of which machine
has it, and its modification time is renewed every few seconds. A holder that does not renew it while it is watched is
gone. The clocks of two machines are never compared: only whether the time changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import datetime
from typing import Any

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_HEARTBEAT_SECONDS = 5.0
_WATCH_SECONDS = 30.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Descriptors of the locks of this process. A forked child (a data worker) has them as well, and would keep the lock after
# the trainer was killed; started programs do not get them, as Python opens files close-on-exec.
_descriptors: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunInUseError(ValueError):
    """Another process trains in this OUTPUT_DIR; says which."""


class RunLock:
    """The right to write into an OUTPUT_DIR, from ``acquire`` to ``release`` or the end of the process."""

    def __init__(
        self,
        output_dir: str,
        *,
        heartbeat_seconds: float = _HEARTBEAT_SECONDS,
        watch_seconds: float = _WATCH_SECONDS,
    ) -> None:
        """
        Args:
            output_dir: an existing folder.
            heartbeat_seconds: between signs of life of the holder.
            watch_seconds: how long a holder on another machine may give none before it counts as gone.
        """
        self.path = os.path.join(output_dir, LOCK_FILE)
        self.heartbeat_seconds = heartbeat_seconds
        self.watch_seconds = watch_seconds
        self._descriptor = -1
        self._is_ours = False  # from acquire to release, also while the file is gone or another's
        self._ended = threading.Event()
        self._thread = threading.Thread()
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": _machine(),
            "token": secrets.token_hex(8),
        }

    def acquire(self) -> str:
        """Take the lock, and keep it.

        Returns:
            Whose lock was taken over, in a sentence, or an empty string: a process that was killed leaves one.

        Raises:
            RunInUseError: if another process has it: host, process id and when it started.
        """
        took_over = self._acquire()
        self._is_ours = True
        return took_over

    def _acquire(self) -> str:
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            _descriptors.add(self._descriptor)
            try:
                has_flock = self._flock()
                if not has_flock or self._is_current():
                    return self._take(has_flock)
            except BaseException:
                self._close()
                raise
            self._close()  # its last holder removed that file in this moment

    def keep(self) -> bool:
        """See that the lock is still that of ``acquire``, before something is written that another run could lose.

        Who removes OUTPUT_DIR removes the lock, and another process may then have locked a new file. If none has, this
        one does, and says so.

        Returns:
            Whether it was taken anew: what was in the folder may be gone.

        Raises:
            RunInUseError: if another process has it now.
            OSError: if there can be no file, e.g. because OUTPUT_DIR has become one. The next call tries again.
        """
        if not self._is_ours or self._is_current():
            return False
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        self._ended.set()
        self._thread.join()
        self._close()
        try:
            self._acquire()
        except RunInUseError as error:
            raise RunInUseError(
                f"The lock {self.path} of this run was removed, and taken by another. {error}"
            ) from None
        logger.warning("OUTPUT_DIR %s was removed or replaced; this run has locked it anew and goes on there.", folder)
        return True

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if not self._is_ours or self._me["pid"] != os.getpid():
            return
        self._is_ours = False
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._descriptor >= 0 and self._holder().get("token") == self._me["token"]:
                os.unlink(self.path)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1

    def _flock(self) -> bool:
        """Whether the file system has flocks; then this process holds that of the file."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUseError(self._in_use(self._holder())) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        return True

    def _is_current(self) -> bool:
        """Whether a file is open, and the path still names it."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _take(self, has_flock: bool) -> str:
        holder = self._holder()
        took_over = ""
        if holder:
            # On this machine an flock that could be had says that its holder is gone.
            if not (has_flock and holder.get("machine") == self._me["machine"]) and self._shows_life(holder):
                raise RunInUseError(self._in_use(holder))
            took_over = f"Took over the lock {self.path} of a process that is gone: {_named(holder)}."
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(self._me).encode(), 0)
        os.fsync(self._descriptor)
        if not has_flock:
            time.sleep(min(1.0, self.heartbeat_seconds))  # two may have come this far: the last one to write has it
            if (holder := self._holder()).get("token") != self._me["token"]:
                raise RunInUseError(self._in_use(holder))
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return took_over

    def _shows_life(self, holder: dict[str, Any]) -> bool:
        logger.warning(
            "%s names %s; watching for up to %.0f seconds whether it is alive.",
            self.path,
            _named(holder),
            self.watch_seconds,
        )
        before = self._sign_of_life()
        end = time.monotonic() + self.watch_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self.heartbeat_seconds / 2))
            if self._sign_of_life() != before:
                return True
        return False

    def _sign_of_life(self) -> tuple[int, bytes]:
        # Opened anew, as a network file system asks its server for the state of a file when it is opened.
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
        return 0, b""  # removed by its holder, which was alive then

    def _holder(self) -> dict[str, Any]:
        """What the file says; empty for a new file, or one that a killed process left half written."""
        with contextlib.suppress(ValueError, FileNotFoundError):
            with open(self.path, encoding="utf-8") as file:
                content = json.load(file)
            if isinstance(content, dict):
                return content
        return {}

    def _in_use(self, holder: dict[str, Any]) -> str:
        folder = os.path.dirname(self.path)
        return (
            f"OUTPUT_DIR {folder} is in use by {_named(holder)}. Wait for that run to end, end it with `kill` on that "
            "host (it saves and can be resumed), or choose another OUTPUT_DIR."
        )

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat_seconds):
            # The folder may be away for a while; the run has its own errors for that.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def _machine() -> str:
    """What is the same for the processes of one running system; its name alone may be that of several."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()
    return socket.gethostname()


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"
