"""Where checkpoints lie: a local folder, or a folder of an object store through fsspec.

Both hold one folder per checkpoint, complete when it has its final name and its manifest. On a
local file system a save writes into a working folder that is renamed; object stores have no rename,
so there the manifest, written last, is what makes a folder complete. Names below are relative to
the storage and have the form FOLDER or FOLDER/FILE.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ilm_compile.runtime.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 30
# InternLM's prefix for S3: boto3:s3://BUCKET.ENDPOINT/PATH (its doc/usage.md).
_BOTO3 = re.compile(r"boto3:s3://(?P<bucket>[^./]+)\.(?P<endpoint>[^/]+)/(?P<path>.*)")
_URL = re.compile(r"[A-Za-z0-9+.-]+://")
STEP = re.compile(r"step-(\d{8,18})")  # the name of a checkpoint's folder
_LEFT_OVER = re.compile(r"step-\d{8,18}\.tmp-[0-9a-f]+")
_REPLACED = re.compile(r"(?P<name>step-\d{8,18})\.old-[0-9a-f]+")
_RANK = re.compile(r"-(\d+)")  # in the name of a file: whose it is
_NOT_LAST = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


class Storage(Protocol):
    """What a checkpoint manager asks of a place. Errors of the system are `OSError`s."""

    url: str

    def working_name(self, name: str, nonce: str) -> str:
        """The folder in which a save of `name` writes before it is complete."""

    def prepare(self, working: str) -> None:
        """Make an empty working folder."""

    def publish(self, working: str, name: str, manifest: bytes) -> None:
        """Write the manifest and make the folder complete, in place of an older one."""

    def retire(self, name: str) -> str:
        """Make a folder look incomplete, in one operation; returns its name from then on."""

    def replaced(self) -> list[str]:
        """Retire the folders that newer ones of the same step have replaced; returns the names."""

    def left_over(self) -> list[str]:
        """The names of what killed saves left to be deleted; what they had put aside is back."""

    def delete_folder(self, name: str, *, rank: int = 0, size: int = 1) -> None:
        """Delete of a retired folder what rank `rank` of `size` has to; who is last, the folder."""

    def folders(self) -> list[str]:
        """The names of all folders, working ones included."""

    def create(self, path: str) -> Any:
        """A context manager: a new file to write, safe on the disk when it is closed."""

    def open(self, path: str) -> Any:
        """A context manager: a file to read."""

    def delete(self, path: str) -> None:
        """Delete a file."""

    def size(self, path: str) -> int:
        """Size of a file in bytes. Raises `FileNotFoundError`."""

    def free_bytes(self) -> int | None:
        """Free space, None if there is no limit that can be asked for."""


def open_storage(url: str | Path) -> Storage:
    """The storage at `url`: a path, ``local:PATH``, or what fsspec opens (``s3://BUCKET/PATH``).

    ``boto3:s3://BUCKET.ENDPOINT/PATH`` is S3 at another endpoint. Keys come from where the
    file system's own library looks for them (AWS_ACCESS_KEY_ID and so on), never from the URL.
    """
    text = str(url)
    if text.startswith("local:") or ":" not in text.split("/")[0]:
        path = text.removeprefix("local:")
        if not path:
            raise CheckpointError(f"checkpoint folder: expected a path, got {text!r}")
        return LocalStorage(Path(path).absolute())
    options: dict[str, Any] = {}
    if (match := _BOTO3.fullmatch(text)) is not None:
        text = f"s3://{match['bucket']}/{match['path']}"
        options["client_kwargs"] = {"endpoint_url": f"http://{match['endpoint']}"}
    if not _URL.match(text):
        raise CheckpointError(
            f"checkpoint folder: expected a path, local:PATH or a URL such as s3://BUCKET/PATH, "
            f"got {text!r}; volc: and oss2: stores are reached over their S3 endpoints: "
            "boto3:s3://BUCKET.ENDPOINT/PATH"
        )
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(text, **options)
    except ImportError as error:
        raise CheckpointError(
            f"checkpoint folder: {text} needs a package: {error}; for S3: "
            "pip install 'ilm_compile[s3]'"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint folder: {text} cannot be opened: {error}") from error
    if not root.strip("/"):
        raise CheckpointError(f"checkpoint folder: expected a folder in the bucket, got {text!r}")
    return ObjectStorage(str(url), filesystem, root.rstrip("/"))


def remove(storage: Storage, name: str) -> None:
    """Delete a folder; at no time does it look complete without being so."""
    storage.delete_folder(storage.retire(name))


def read_whole(storage: Storage, path: str) -> bytes:
    """The content of a file of at most `MAX_JSON_BYTES`. Raises `CheckpointError`.

    One that is not there is a `FileNotFoundError`.
    """
    try:
        size = storage.size(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{storage.url}/{path}: expected at most {MAX_JSON_BYTES} bytes, got {size}"
            )
        with storage.open(path) as file:
            data: bytes = file.read(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{storage.url}/{path}: cannot be read: {error}") from error
    return data


class LocalStorage:
    """A folder of a file system whose renames are atomic; shared by all ranks of a job."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def working_name(self, name: str, nonce: str) -> str:
        return f"{name}.tmp-{nonce}"

    def prepare(self, working: str) -> None:
        self.delete_folder(working)
        (self._root / working).mkdir(parents=True)

    def publish(self, working: str, name: str, manifest: bytes) -> None:
        with self.create(f"{working}/{MANIFEST}") as file:
            file.write(manifest)
        _sync_folder(self._root / working)
        final = self._root / name
        if final.exists():
            os.rename(final, self._root / f"{name}.old-{working.rpartition('-')[2]}")
        os.rename(self._root / working, final)
        _sync_folder(self._root)

    def retire(self, name: str) -> str:
        gone = f"{name.partition('.')[0]}.tmp-{os.urandom(4).hex()}"
        with suppress(FileNotFoundError):
            os.rename(self._root / name, self._root / gone)
        return gone

    def replaced(self) -> list[str]:
        found = [match for name in self.folders() if (match := _REPLACED.fullmatch(name))]
        # Retired, for half of a folder must not be put back once the newer one is deleted too.
        return [self.retire(m[0]) for m in found if (self._root / m["name"]).exists()]

    def left_over(self) -> list[str]:
        for name in self.folders():
            match = _REPLACED.fullmatch(name)
            if match is not None and not (self._root / match["name"]).exists():
                os.rename(self._root / name, self._root / match["name"])
        self.replaced()
        return [name for name in self.folders() if _LEFT_OVER.fullmatch(name)]

    def delete_folder(self, name: str, *, rank: int = 0, size: int = 1) -> None:
        path = self._root / name
        if path.is_symlink():  # the link alone, for where it leads is somebody else's
            if rank == 0:
                path.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            for entry in list(path.iterdir()):
                if _owner(entry.name) % size == rank:
                    _delete(entry)
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in _NOT_LAST:
                raise

    def folders(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        with (self._root / path).open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        # A link could lead out of the folder, and a pipe could wait for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self._root / path, flags)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{self.url}/{path}: expected a regular file")
            yield file

    def delete(self, path: str) -> None:
        (self._root / path).unlink()

    def size(self, path: str) -> int:
        return (self._root / path).lstat().st_size

    def free_bytes(self) -> int | None:
        place = self._root
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


class ObjectStorage:
    """A prefix of an fsspec file system. One job writes to it at a time."""

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url
        self._fs = filesystem
        self._root = root

    def working_name(self, name: str, nonce: str) -> str:
        return name

    def prepare(self, working: str) -> None:
        remove(self, working)
        with suppress(NotImplementedError):
            self._fs.makedirs(f"{self._root}/{working}", exist_ok=True)

    def publish(self, working: str, name: str, manifest: bytes) -> None:
        assert working == name
        self._fs.pipe_file(f"{self._root}/{name}/{MANIFEST}", manifest)

    def retire(self, name: str) -> str:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        return name

    def replaced(self) -> list[str]:
        return []

    def left_over(self) -> list[str]:
        steps = [name for name in self.folders() if STEP.fullmatch(name)]
        return [n for n in steps if not self._fs.exists(f"{self._root}/{n}/{MANIFEST}")]

    def delete_folder(self, name: str, *, rank: int = 0, size: int = 1) -> None:
        if rank == 0:  # one request of a store deletes a thousand files
            with suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def folders(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        names = [
            e["name"].rstrip("/").rpartition("/")[2] for e in found if e["type"] == "directory"
        ]
        return sorted(names)

    @contextmanager
    def create(self, path: str) -> Iterator[Any]:
        with self._fs.open(f"{self._root}/{path}", "wb") as file:
            yield file

    @contextmanager
    def open(self, path: str) -> Iterator[Any]:
        with self._fs.open(f"{self._root}/{path}", "rb") as file:
            yield file

    def delete(self, path: str) -> None:
        self._fs.rm_file(f"{self._root}/{path}")

    def size(self, path: str) -> int:
        return int(self._fs.info(f"{self._root}/{path}")["size"])

    def free_bytes(self) -> int | None:
        return None


def _sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner(file: str) -> int:
    """The number of the rank that a file of a checkpoint is of, 0 if it is of none."""
    match = _RANK.search(file)
    return int(match[1]) if match else 0


def _delete(path: Path) -> None:
    """Delete what lies in a folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
