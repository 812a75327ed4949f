"""The journal of a work folder: which of its files are finished, with their hashes, and under which settings.

A file counts once its entry is in the journal: it is written under a temporary name, flushed to the disk and renamed,
and then the journal likewise. So a process that is killed at any moment leaves a journal that is true.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from optrot_edge.errors import InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows, where folders are not guarded
    fcntl = None

JOURNAL = "journal.json"
FORMAT = 1


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def commit(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name, flush it to the disk and rename it to `path`."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """Entries by file name, in the order in which the files were made: {"sha256", "about"}; notes have no hash.

    `settings` is what the files depend on (JSON). Raises StorageError when the disk refuses.
    """

    def __init__(self, folder: Path, settings: dict, entries: dict[str, dict] | None = None):
        self.folder, self.settings, self.entries = folder, settings, entries or {}

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal of `folder`, None without one; InputError when it is damaged or of another version."""
        path = folder / JOURNAL
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            version, settings, entries = stored["format"], stored["settings"], stored["entries"]
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); start over with --restart") from None
        if version != FORMAT:
            raise InputError(f"{folder} was begun by another version of optrot-edge; finish it with that, or start "
                             "over with --restart")
        return cls(folder, settings, entries)

    def save(self) -> None:
        """Write the journal, through a temporary name."""
        text = json.dumps({"format": FORMAT, "settings": self.settings, "entries": self.entries}) + "\n"
        try:
            commit(self.folder / JOURNAL, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written: {error}") from None

    def keep(self, name: str, about: dict | None = None) -> None:
        """Enter the finished file `name`."""
        self.entries[name] = {"sha256": sha256(self.folder / name), "about": about or {}}
        self.save()

    def note(self, name: str, about: dict) -> None:
        """Enter something that is known, without a file."""
        self.entries[name] = {"about": about}
        self.save()

    def about(self, name: str) -> dict | None:
        """What was entered with `name`; None when it is not finished."""
        entry = self.entries.get(name)
        return None if entry is None else entry["about"]

    def verify(self) -> None:
        """Drop the first file that is not what was entered and all that came later, with a warning; delete what has no
        entry, except folders with a journal of their own."""
        names = list(self.entries)
        for index, name in enumerate(names):
            wanted, path = self.entries[name].get("sha256"), self.folder / name
            if wanted is not None and not (path.is_file() and sha256(path) == wanted):
                warnings.warn(f"{path} is damaged or missing; it and what followed are made again", stacklevel=2)
                self.entries = {kept: self.entries[kept] for kept in names[:index]}
                self.save()
                break
        known = {self.folder / name for name in (*self.entries, JOURNAL)}
        known |= {path.parent for path in known}
        for path in self.folder.iterdir():
            if path.is_dir() and path not in known and not (path / JOURNAL).exists():
                shutil.rmtree(path)
            elif path.is_file() and path not in known:
                path.unlink()

    def clear(self, *extra: str) -> None:
        """End the journal of a finished folder: delete the files `extra` and then the journal."""
        for name in (*extra, JOURNAL):
            (self.folder / name).unlink(missing_ok=True)


class Lock:
    """Keeps other processes out of a work folder for as long as this one lives; `path` is a file beside it.

    Use it as a context manager, or `release` it. Raises InputError when another process holds it, or `path` cannot be
    made.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._taken():
                pass
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
            raise InputError(f"another process ({holder}) is writing {path.name.removesuffix('.lock')}; wait for it, "
                             "or choose another --out") from None
        except OSError as error:
            what = path.with_suffix("").name
            raise InputError(f"cannot create {path.parent / what}: {error.strerror}; choose another --out") from None

    @classmethod
    def of(cls, folder: Path) -> Lock:
        """The lock of a folder, one whatever links lead there."""
        folder = folder.resolve()
        return cls(folder.with_name(folder.name + ".lock"))

    def _taken(self) -> bool:
        """Whether the lock was taken on the file that has the name now, not on one just deleted."""
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            held, named = os.fstat(self._handle), os.stat(self.path)
        except FileNotFoundError:
            os.close(self._handle)
            return False
        except BaseException:
            os.close(self._handle)
            raise
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
            os.close(self._handle)
            return False
        if (said := os.read(self._handle, 64).strip()) and not said.isdigit():
            os.close(self._handle)
            raise InputError(f"{self.path} is in the way and no lock of optrot-edge; move it, or choose another --out")
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, f"{os.getpid()}\n".encode())
        return True

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            warnings.warn(f"{self.path.parent} knows no locks ({error.strerror}); start no second process there",
                          stacklevel=2)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc) -> None:
        self.release()

    def release(self) -> None:
        """Delete the file and let others in."""
        if os.name == "nt":  # deletes no open file; there is no lock that another could take in between
            os.close(self._handle)
            self.path.unlink(missing_ok=True)
        else:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)


def remove_folder(folder: Path) -> None:
    """Delete a work folder, its journal first: what is half deleted must not look unfinished."""
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def digest(folder: Path) -> str:
    """Hex digest of a folder's files and their names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = "".join(f"{sha256(file)} {file.relative_to(folder)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def move_folder(new: Path, out: Path) -> None:
    """Rename the folder `new` to `out`; a folder that is there is set aside first, and deleted last."""
    aside = _aside(out)
    if out.exists():
        remove_folder(aside)
        out.rename(aside)
    try:
        new.rename(out)
    except BaseException:
        restore_folder(out)
        raise
    sync_folder(out.absolute().parent)
    remove_folder(aside)


def restore_folder(out: Path) -> None:
    """Undo or end what a `move_folder` began that was stopped."""
    aside = _aside(out)
    if aside.exists() and not out.exists():
        aside.rename(out)
    remove_folder(aside)


def _aside(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".optrot-replaced")
