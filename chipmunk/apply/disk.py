"""Durable writes and the lock: the only place where this package changes the disk.

Every write goes to a temporary file, is synchronised, and takes its name by a rename; so a process that is killed at
any instant leaves the old file or the new one, never a part. Only the `os` functions are used for writing, one system
call each, so that tests can stop the process between any two of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chipmunk.apply.errors import Busy, Refused, quoted

_PATIENCE = 0.4
"""Seconds to wait for a lock; one who only looks whether it is held holds it for an instant."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def write_new(path: Path, data: bytes, like: Path | None = None) -> None:
    """Write and synchronise a new file. With `like`, it gets that file's mode, owner and extended attributes;
    otherwise the owner of its folder."""
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o644 if like is None else 0o600
    try:
        fd = os.open(path, flags, mode)
    except FileExistsError:  # left over from a run that was killed
        os.unlink(path)
        fd = os.open(path, flags, mode)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        if like is None:
            _give(fd, path.parent)
        else:
            _copy_metadata(like, fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_metadata(like: Path, fd: int) -> None:
    """Mode always; owner and extended attributes (access lists, security labels) where this user may set them."""
    _give(fd, like)
    if sys.platform != "win32":
        os.fchmod(fd, stat.S_IMODE(os.stat(like).st_mode))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for name in os.listxattr(like):
                os.setxattr(fd, name, os.getxattr(like, name))


def _give(fd: int, like: Path) -> None:
    """Hand a file or folder to the owner of another, where this user may: root in a container may."""
    if sys.platform != "win32":
        wanted, current = os.stat(like), os.fstat(fd)
        if (wanted.st_uid, wanted.st_gid) != (current.st_uid, current.st_gid):
            with contextlib.suppress(PermissionError):
                os.fchown(fd, wanted.st_uid, wanted.st_gid)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, replacing it in one step, and make that durable."""
    os.replace(source, target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def make_folder(folder: Path) -> None:
    """Make a folder, durably, for the owner of the folder that it is in. Raises FileExistsError."""
    os.mkdir(folder)
    if sys.platform != "win32":
        fd = os.open(folder, os.O_RDONLY)
        try:
            _give(fd, folder.parent)
        finally:
            os.close(fd)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; where a platform cannot synchronise folders, there is nothing to do."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def refuse_read_only(path: Path, shown: str) -> None:
    """Refuse a file that may not be replaced. The mode counts even where the user (root) could override it."""
    for what, place, bits in (("file", path, os.W_OK), ("folder", path.parent, os.W_OK | os.X_OK)):
        if not os.stat(place).st_mode & 0o222 or not os.access(place, bits):
            name = shown if what == "file" else str(Path(shown).parent)
            raise Refused(
                f"the {what} is read-only; nothing was changed", file=name, next_command=f"chmod u+w {quoted(place)}"
            )


@contextmanager
def exclusive(lock: Path, root: Path) -> Iterator[None]:
    """Hold an operating-system lock on `lock`, whose folder is made if needed; the system drops it if we are killed.

    Raises `Busy` if another process holds it. The file may be removed while the lock is held: whoever opened the
    removed file sees that its name is gone, and starts again.
    """
    while True:
        try:
            make_folder(lock.parent)
        except FileExistsError:
            pass
        except FileNotFoundError:
            if not root.is_dir():
                raise
            continue  # another run tidied it away as soon as it was there
        try:
            if not stat.S_ISDIR(os.lstat(lock.parent).st_mode):
                raise Refused(
                    f"{lock.parent.name} must be a folder, not a link or a file",
                    file=lock.parent.name,
                    next_command=f"ls -ld {quoted(lock.parent)}",
                )
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_FOLLOW | _BINARY, 0o644)
        except FileNotFoundError:
            continue  # another run has just tidied the folder away
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(lock.parent)  # only if it is empty: if we made it
            raise
        try:
            patience = time.monotonic() + _PATIENCE
            while not _try_lock(fd):
                if time.monotonic() > patience:
                    raise busy(root)
                time.sleep(_PATIENCE / 20)
            if not _is_named(fd, lock):
                continue
            _give(fd, lock.parent)
            yield
            return
        finally:
            os.close(fd)


def busy(root: Path) -> Busy:
    return Busy(
        "another chipmunk run is changing this repository",
        next_command=f"chipmunk status {quoted(root)}   (once the other run has ended)",
    )


def is_locked(lock: Path) -> bool:
    """Whether another process holds the lock now. Changes nothing."""
    try:
        fd = os.open(lock, os.O_RDWR | _NO_FOLLOW | _BINARY)
    except OSError:
        return False
    try:
        return not _try_lock(fd)
    except Refused:
        return False
    finally:
        os.close(fd)


def _is_named(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Refused(
                f"this file system cannot lock files ({error.strerror}), so two runs at once could not be told apart; "
                "nothing was changed",
                next_command="cp -r REPOSITORY /tmp/   (any folder on a local disk)",
            ) from error
        return True
