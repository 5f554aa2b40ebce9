"""Files below one URL: list, read, read a range, write; what breaks off is repeated.

Schemes are fsspec's: s3 through s3fs, gs through gcsfs, hf through huggingface_hub, https and http plainly. A plain
server lists nothing, so there `files.json`, which `decant cache push` writes, says what is there; such a server's
directory is a place to write to as well. Credentials are those that these libraries find by themselves; no message
shows a query, where some servers put signatures.
Cost: one request per listing of a thousand files, one per small file, one per `BLOCK_BYTES` of a part.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from shared.atomic import TEMPORARY_MARK, fill_atomic, make_dir, write_atomic
from shared.errors import CacheError, DamagedError, DecantError, first_line
from shared.places import is_url
from shared.schema import MAX_JSON_BYTES

BLOCK_BYTES = 2**23
"""Bytes of one ranged request: large beside its latency, small beside memory."""
LIST_FILE = "files.json"
"""What is below a URL, where a server cannot tell."""
CARD_FILE = "README.md"
"""What people read there."""
MOST_ATTEMPTS = 8
HUB_BATCH = 64
PARALLEL = 16
"""Transfers at the same time."""
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 20.0
_SILENT_SECONDS = 60.0
"""How long a web server may send nothing before it is asked again; the other libraries have bounds of their own."""
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
    "file": "fsspec",
}
_WAIT_AND_TRY = (408, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, DecantError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "OfflineModeIsEnabled")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/")
_QUERY = re.compile(r"\?[^\s'\")>]*")

Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """What a listing says about a file."""

    size: int
    version: str
    """Changes when the file does: an entity tag, a hash or a time."""
    xxh3: str = ""
    """Checksum, where another file says it."""


class Remote:
    """Files below one URL, or in a directory of this machine; threads may share it."""

    def __init__(self, url: str) -> None:
        """Name a place; nothing is asked yet.

        Raises:
            NamingError: the URL is the hub's and names no repository.
        """
        self.url = url.rstrip("/")
        self.scheme = urlsplit(url).scheme if is_url(url) else "file"
        if self.scheme == "hf":
            from shared.remote.hub import hub_place

            hub_place(self.url)
        self.lists_in_file = self.scheme in ("http", "https")
        self.files_per_write = HUB_BATCH if self.scheme == "hf" else 1
        """Files that go in one call: a hub keeps each call as a commit."""

    def list_files(self, listed: Callable[[bytes, str], Mapping[str, RemoteFile]]) -> dict[str, RemoteFile]:
        """Return size and version of every file below, by its path relative to the URL; none where nothing is there.

        Args:
            listed: reads the content of `files.json`, called with bytes and URL, where the server lists nothing.

        Raises:
            CacheError: the place cannot be asked.
        """
        if self.lists_in_file:
            try:
                return dict(listed(self.read(LIST_FILE), f"{self.url}/{LIST_FILE}"))
            except FileNotFoundError:
                raise CacheError(
                    f"{self.url} has no {LIST_FILE}, without which nobody can tell what a web server holds; write it "
                    "with `decant cache push CACHE DIRECTORY` into the directory that is served, or correct the URL"
                ) from None
        files = self._files()
        try:
            found = self._tried("", lambda: _listing(files, self._path("")))
        except FileNotFoundError:
            return {}
        root = files._strip_protocol(self.url).rstrip("/") + "/"
        return {name.removeprefix(root): RemoteFile(int(e["size"]), _version(e)) for name, e in found.items()}

    def read(self, name: str, most: int = MAX_JSON_BYTES) -> bytes:
        """Return the bytes of a small file, of at most `most`.

        Raises:
            CacheError: it cannot be read.
            DamagedError: it has more bytes.
            FileNotFoundError: it is not there.
        """
        data = self._tried(name, lambda: self._whole(name, most))
        if len(data) > most:
            raise DamagedError(f"{self._path(name)} has more than {most:,} bytes; it was altered")
        return data

    def _whole(self, name: str, most: int) -> bytes:
        if self.lists_in_file:
            return self._streamed(name, 0, most + 1)
        return bytes(self._files().cat_file(self._path(name)))

    def _streamed(self, name: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of a file, or as many as a web server sends of them: it may send without end."""
        headers = {"Range": f"bytes={start}-{end - 1}"}
        found = bytearray()
        with self._files().open(self._path(name), block_size=0, size=1, headers=headers) as stream:
            before = 0 if stream.r.status == 206 else start  # a server that knows no ranges sends all of it
            first, last = _said_range(stream.r) or (start, start - 1)
            while len(found) < end - start and (piece := stream.read(min(BLOCK_BYTES, end - start))):
                found += piece[before:]
                before -= min(before, len(piece))
        if first != start or len(found) < min(last + 1, end) - start:
            raise ConnectionError(f"{len(found):,} bytes from {first:,} came of {start:,} to {last:,}")
        return bytes(found[: end - start])

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of a file; errors as for `read`, and for fewer bytes than asked for."""

        def attempt() -> bytes:
            if self.lists_in_file:
                data = self._streamed(name, start, end)
            else:
                data = bytes(self._files().cat_file(self._path(name), start=start, end=end))
            if len(data) != end - start:
                raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
            return data

        return self._tried(name, attempt)

    def unfinished(self, names: Sequence[str]) -> list[str]:
        """Return what writers that were killed, or still write, left of files below the URL: a directory keeps
        temporary files, S3 the pieces of large ones, which no listing shows and which cost as much.

        Args:
            names: every file below, as listed.
        """
        found = [name for name in names if TEMPORARY_MARK in name.rsplit("/", 1)[-1]]
        if self.scheme != "s3":
            return found
        bucket, below, _ = self._files().split_path(self.url)
        try:
            uploads = self._files().list_multipart_uploads(bucket)
        except Exception:  # noqa: BLE001 - not every server tells, nor everybody; it is only asked for a note
            return found
        keys = [str(upload["Key"]) for upload in uploads]
        return found + [key.removeprefix(f"{below}/") for key in keys if key.startswith(f"{below}/" if below else "")]

    def write_all(self, written: Sequence[tuple[str, Path | bytes]]) -> None:
        """Write files, each whole, in their order.

        Raises:
            CacheError: one cannot be written.
        """
        if self.scheme == "hf":
            from shared.remote.hub import commit_files

            self._tried(written[0][0], lambda: commit_files(self.url, written))
            return
        for name, source in written:
            self._tried(name, lambda name=name, source=source: self._write(name, source))  # type: ignore[misc]

    def _write(self, name: str, source: Path | bytes) -> None:
        if self.scheme == "file":
            _write_whole(Path(self.url, name), source)
        elif isinstance(source, bytes):
            self._files().pipe_file(self._path(name), source)
        else:
            self._files().put_file(str(source), self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _files(self) -> Any:
        return _filesystem(self.scheme, os.getpid())

    def _tried(self, name: str, attempt: Callable[[], Result]) -> Result:
        """Repeat an attempt while it may pass; name the file, or the place, in what it raises at last."""
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        waits = wait_exponential_jitter(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS)
        repeated = Retrying(
            stop=stop_after_attempt(MOST_ATTEMPTS), wait=waits, retry=retry_if_exception(_may_pass), reraise=True
        )
        try:
            return repeated(attempt)
        except (FileNotFoundError, DecantError):
            raise
        except Exception as error:  # noqa: BLE001 - every backend raises kinds of its own; each becomes one sentence
            said = _QUERY.sub("?...", first_line(error))[:300]
            tries = f" in {MOST_ATTEMPTS} attempts" if _may_pass(error) else ""
            raise CacheError(
                f"{self._path(name)} cannot be reached{tries} ({type(error).__name__}: {said}); check the URL, the "
                "network and the credentials of that scheme"
            ) from None


def _write_whole(target: Path, source: Path | bytes) -> None:
    make_dir(target.parent)
    if isinstance(source, bytes):
        write_atomic(target, source, "pushed")
        return
    with source.open("rb") as data:
        fill_atomic(target, lambda file: shutil.copyfileobj(data, file), "pushed", source.stat().st_size)


def _may_pass(error: BaseException) -> bool:
    """Tell whether the same request may succeed a moment later."""
    if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
        return False
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _WAIT_AND_TRY
    return isinstance(error, Exception)


@lru_cache(maxsize=8)
def _filesystem(scheme: str, pid: int) -> Any:
    """Return fsspec's file system of a scheme, one per process: connections do not survive a fork.

    Raises:
        CacheError: a package is missing.
    """
    try:
        import fsspec
        import tenacity  # noqa: F401 - said together with the others

        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            options = {"client_kwargs": {"trust_env": True, "timeout": ClientTimeout(sock_read=_SILENT_SECONDS)}}
        files = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        if getattr(files, "async_impl", False):
            files.loop.set_exception_handler(_let_connections_break)
        return files
    except ImportError as error:
        package = _PACKAGES[scheme]
        extra = "pip install gcsfs" if scheme == "gs" else "pip install 'decant-kd[remote]'"
        raise CacheError(
            f"{scheme}:// needs the package {package}, which cannot be imported ({error}); install it with {extra}"
        ) from None


def _said_range(response: Any) -> tuple[int, int] | None:
    """Return the first and last byte that a web server says to send, of bytes that are not compressed; None where it
    says neither.
    """
    found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if response.status != 206 or found is None or response.headers.get("Content-Encoding", "identity") != "identity":
        return None
    return int(found[1]), int(found[2])


def _let_connections_break(loop: Any, context: dict[str, Any]) -> None:
    """Say nothing of a connection that broke under a task that nobody waits for, or was left after a refusal: its
    request failed and is repeated, or told.
    """
    if "client_connection" in context:
        return
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def _listing(files: Any, path: str) -> dict[str, Any]:
    """Return the files below a path; the path itself is none, which s3fs lists where its first file comes meanwhile."""
    files.invalidate_cache()
    found: dict[str, Any] = files.find(path, detail=True)
    return {name: entry for name, entry in found.items() if entry.get("type") != "directory"}


def _version(entry: Mapping[str, Any]) -> str:
    for name in ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime"):
        if entry.get(name):
            return str(entry[name]).strip('"')
    raise DamagedError(f"the listing of {entry.get('name')} tells neither a tag nor a time; it cannot be followed")
