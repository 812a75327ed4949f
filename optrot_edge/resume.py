"""Writing a checkpoint so that a run which is killed can go on where it was.

The work folder is `NAME.partial` beside the output, with a journal of what is finished (see `optrot_edge.journal`).
Files that are damaged are not trusted: they and all that were made later are made again. A folder that was begun under
other settings is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from optrot_edge.checkpoint import (
    INPUTS,
    MANIFEST,
    InputSums,
    Tensors,
    check_replaceable,
    manifest_text,
    read_shard,
    save_input_sums,
    save_shard,
)
from optrot_edge.errors import InputError, StorageError
from optrot_edge.fingerprint import differences
from optrot_edge.journal import (
    JOURNAL,
    Journal,
    Lock,
    commit,
    digest,
    move_folder,
    remove_folder,
    restore_folder,
    sha256,
    sync_folder,
)
from optrot_edge.models.gguf_parts import move_set, outputs

ROTATION = "rotation.safetensors"  # learned once; not part of a checkpoint


class WorkFolder:
    """A checkpoint in the making, with a journal: each shard is committed with the reports on its tensors.

    `settings` are what it depends on. Opening a folder that has a journal checks the files in it.
    """

    def __init__(self, work: Path, settings: dict):
        self.work = work
        journal = Journal.load(work)
        self.resumed = journal is not None
        if journal is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            journal = Journal(work, settings)
            journal.save()
        else:
            journal.verify()
        self.journal = journal

    @property
    def tensors(self) -> dict[str, dict]:
        """Manifest entries of all tensors so far, in the order in which they were made."""
        return {name: entry for about in self.journal.entries.values()
                for name, entry in about["about"].get("tensors", {}).items()}

    def kept(self, shard: str) -> dict | None:
        """The reports on a finished shard; None when it has to be made."""
        about = self.journal.about(f"{shard}.safetensors")
        return None if about is None else about["reports"]

    def read(self, shard: str) -> Tensors:
        """The tensors of a finished shard."""
        file = f"{shard}.safetensors"
        return read_shard(self.work / file, self.journal.about(file)["tensors"])

    def write_shard(self, shard: str, tensors: Tensors, reports: dict | None = None,
                    inputs: InputSums | None = None) -> None:
        """Commit the sums of the `inputs`, if any, then `tensors` as `shard`.safetensors with `reports` (JSON)
        on them."""
        file, entries = f"{shard}.safetensors", {}
        try:
            if inputs:
                commit(self.work / (INPUTS + file), lambda partial: save_input_sums(partial, inputs))
                self.journal.keep(INPUTS + file)
            commit(self.work / file, lambda partial: entries.update(save_shard(partial, tensors, file)))
        except (SafetensorError, OSError) as error:
            raise StorageError(f"{self.work} cannot be written: {error}") from None
        self.journal.keep(file, {"tensors": entries, "reports": reports or {}})

    def rotation(self, make):
        """The rotation kept here or, the first time, the one that `make()` returns; always as read from the disk."""
        from optrot_edge.rotations.rotation import Rotation

        path = self.work / ROTATION
        if self.journal.about(ROTATION) is None:
            commit(path, lambda partial: make().save(partial))
            self.journal.keep(ROTATION)
        return Rotation.load(path)

    def adopt(self, better: Path, note: str, about: dict) -> None:
        """Put the shards of the folder `better` in the place of those of the same names, and `note` it.

        Of a run that is killed in between, the shards that the journal does not know yet are made again.
        """
        for path in sorted(better.glob("*.safetensors")):
            path.replace(self.work / path.name)
            self.journal.entries[path.name]["sha256"] = sha256(self.work / path.name)
        sync_folder(self.work)
        self.journal.note(note, about)

    def save_tokenizer(self, source) -> None:
        """Commit what a checkpoint keeps of an open model's tokenizer."""
        for path in source.save_tokenizer(self.work / "tokenizer"):
            self.journal.keep(path.relative_to(self.work).as_posix())

    def write_manifest(self, manifest: dict) -> None:
        """Write `optrot.json`, so that the folder can be read as a checkpoint."""
        text = manifest_text(manifest, self.tensors)
        try:
            commit(self.work / MANIFEST, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{self.work} cannot be written: {error}") from None

    def complete(self, manifest: dict) -> None:
        """Commit the manifest, with which the checkpoint is whole."""
        self.write_manifest(manifest)
        self.journal.keep(MANIFEST)

    @property
    def is_complete(self) -> bool:
        """Whether it holds a whole checkpoint."""
        return self.journal.about(MANIFEST) is not None


PACKAGE = "package"  # name of the journal's note on what was exported


def package(folder: WorkFolder, out: Path, options: dict, export: Callable[[Path], dict], *, is_file: bool) -> dict:
    """Put the package of a complete folder at `out`, with `export(path)`, and return its summary; `options` is JSON of
    what else shapes it. `is_file`: a package is a file, or several beside each other, and not a folder.

    It is made beside `out`, noted with its hashes, and then renamed: whichever of these a run was killed after, the
    next one knows whether what lies at `out` is its own.
    """
    new = out.with_name(out.name + ".optrot-new")
    made = folder.journal.about(PACKAGE)
    if made and made.get("options") == options and _hashes(out) == made["files"]:
        if out.is_dir():
            restore_folder(out)  # deletes what it replaced
        return made["summary"]
    remove_folder(new)
    try:
        summary = export(new / out.name if is_file else new)
        files = {path.name: sha256(path) for path in new.iterdir()} if is_file else {out.name: digest(new)}
        summary |= {"path": str(out.with_name(min(files)))}
        folder.journal.note(PACKAGE, {"files": files, "options": options, "summary": summary})
        move_set(new, out) if is_file else move_folder(new, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from None
    finally:
        remove_folder(new)
    return summary


def _hashes(out: Path) -> dict[str, str]:
    """Hex digests, by name, of what lies at `out`: a folder, a file, or parts of a split one."""
    return {out.name: digest(out)} if out.is_dir() else {path.name: sha256(path) for path in outputs(out)}


def was_packaged(checkpoint: Path, out: Path) -> bool:
    """Whether what lies at `out` was made by a run, with its checkpoint at `checkpoint`, that was killed before it
    tidied up, or had moved all parts of a split file."""
    beside = checkpoint.absolute()
    work, found = beside.with_name(beside.name + ".partial"), outputs(out)
    folders = [beside, work, *work.glob("*/")] if found else []
    notes = [note for journal in map(Journal.load, folders) if journal and (note := journal.about(PACKAGE))]
    if notes and any(_hashes(out).items() <= note["files"].items() for note in notes):
        return True
    lock = work.with_name(work.name + ".lock")
    if found and lock.exists():
        with Lock(lock):
            clear_leftovers(work)
    return False


def clear_leftovers(work: Path) -> None:
    """Delete what a run leaves that is killed while it deletes its work folder; an unfinished one stays."""
    if not (work / JOURNAL).is_file():
        remove_folder(work)


class ResumableWriter:
    """Makes a checkpoint at `path`, or (`temporary`) one that lives in the work folder for as long as this is open.

    Use as a context manager, `begin` first, then `finish`. What happens to the work folder when it is left:

    * after `finish`, or a `temporary` one without an exception: it is removed;
    * bad input in a run that was not resumed and is not complete (which another option may package), or nothing
      committed yet: it is removed, nothing is left;
    * anything else (Ctrl-C, a full disk, a failure): it stays, and the same command continues.

    `resume` False refuses what an interrupted run left. Raises InputError when `path` is taken (`overwrite` replaces a
    checkpoint), or another process writes there.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, restart: bool = False, temporary: bool = False,
                 resume: bool = True):
        self.path, self.overwrite, self.restart, self.temporary = Path(path), overwrite, restart, temporary
        self.resume = resume
        beside = self.path.absolute()  # "." has no name to build on
        self.work = beside.with_name(beside.name + ".partial")
        self._folders: list[WorkFolder] = []
        self._lock = Lock(self.work.with_name(self.work.name + ".lock"))
        try:
            if not temporary and not (self.path / JOURNAL).is_file():
                check_replaceable(self.path, overwrite)
        except InputError:
            clear_leftovers(self.work)
            self._lock.release()
            raise

    def begin(self, settings: dict) -> WorkFolder:
        """The work folder, resumed if there is one; InputError when it was begun under other settings."""
        if self.restart:
            remove_folder(self.work)
        if not self.temporary and self.path.exists():
            if self._was_finished(settings):
                return self._open(self.path, settings)
            check_replaceable(self.path, self.overwrite)
        journal = Journal.load(self.work)
        if journal is not None and not self.resume:
            raise InputError(f"{self.work} holds an unfinished run, and several processes cannot go on with one. "
                             "Finish it without torchrun, or start over with --restart")
        if journal is not None and (changed := differences(journal.settings, settings)):
            raise InputError(f"{self.work} holds an unfinished run with other settings: {'; '.join(changed)}. Finish "
                             "it with the former settings, or start over with --restart")
        return self._open(self.work, settings)

    def _was_finished(self, settings: dict) -> bool:
        """Whether `path` is what this very run made before it was killed while tidying up."""
        if self.restart or not (self.path / JOURNAL).is_file():
            return False
        return not differences(Journal.load(self.path).settings, settings)

    def _open(self, work: Path, settings: dict) -> WorkFolder:
        try:
            self._folders.append(WorkFolder(work, settings))
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}; choose another --out") from None
        return self._folders[-1]

    @property
    def first(self) -> WorkFolder:
        """What `begin` returned."""
        return self._folders[0]

    def part(self, name: str) -> WorkFolder:
        """A work folder of its own inside the first one, under the same settings."""
        return self._open(self.first.work / name, self.first.journal.settings)

    def finish(self, folder: WorkFolder) -> Path:
        """Move a complete folder to `path`."""
        if folder.work == self.path:
            return self.path
        try:
            move_folder(folder.work, self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from None
        folder.work = folder.journal.folder = self.path
        return self.path

    def __enter__(self) -> ResumableWriter:
        return self

    def __exit__(self, kind, error, _) -> None:
        try:
            if error is None or self._is_void(error):
                remove_folder(self.work)
                if any(folder.work == self.path for folder in self._folders):
                    Journal(self.path, {}).clear(ROTATION)
            restore_folder(self.path)
        finally:
            self._lock.release()

    def _is_void(self, error: BaseException) -> bool:
        """Whether nothing is worth keeping after `error`."""
        if not self._folders:
            return False  # what lies there is another run's
        if not any(folder.journal.entries for folder in self._folders):
            return True
        bad_input = isinstance(error, InputError) and not isinstance(error, StorageError)
        return bad_input and not self.first.resumed and not any(folder.is_complete for folder in self._folders)
