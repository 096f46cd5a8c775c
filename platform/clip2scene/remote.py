"""An S3 object store, through pyarrow: whole objects below one prefix of a bucket.

Credentials come from the environment of each process (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ... as in all
AWS tools). An :class:`ObjectStore` holds none, so it can be sent to workers and printed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from clip2scene.errors import ConfigError, StorageError, one_line

_ALLOWED = "allowed: a folder, or s3://BUCKET/PREFIX[?endpoint_override=http://HOST:PORT&region=REGION]"
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_ATTEMPTS = 5
"""Attempts per request, with growing pauses: long enough for a server that restarts."""
_CONNECT_TIMEOUT_S = 10
_REQUEST_TIMEOUT_S = 60
_HEADER_BYTES = 2**16
"""Read per request when only the beginning of an object is wanted."""
_CHUNK_BYTES = 2**23
_REFUSALS = ("ACCESS_DENIED", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID")


def is_remote(storage: str | Path) -> bool:
    """Whether a job's ``storage`` is the URI of an object store, not a folder."""
    return "://" in str(storage)


@dataclass(frozen=True)
class ObjectStore:
    """Objects of a bucket by name, each below ``prefix``; picklable."""

    bucket: str
    prefix: str
    """Empty, or ending in a slash."""
    endpoint: str | None
    """``http://HOST:PORT``; None for AWS."""
    region: str | None

    @classmethod
    def of(cls, uri: str) -> ObjectStore:
        """The store of a URI, at the endpoint in its query or in ``AWS_ENDPOINT_URL``.

        Raises:
            ConfigError: the URI is of another kind, or contains a user or a password (not repeated).
        """
        parts = urlsplit(uri)
        if parts.scheme != "s3":
            raise ConfigError(f"storage: {parts.scheme}:// is not known; {_ALLOWED}")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        endpoint = query.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or None
        if "@" in uri or ":" in parts.netloc or "@" in (endpoint or ""):
            raise ConfigError(f"storage: a URI with a user or a password in it; give {_CREDENTIALS} in the environment")
        if not parts.netloc or not set(query) <= {"endpoint_override", "scheme", "region"}:
            raise ConfigError(f"storage: no bucket, or an unknown option; {_ALLOWED}")
        if endpoint is not None and "://" not in endpoint:
            endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
        prefix = parts.path.strip("/")
        return cls(parts.netloc, f"{prefix}/" if prefix else "", endpoint, query.get("region"))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def filesystem(self) -> Any:
        """pyarrow's file system, one per process, with the credentials in the process's environment."""
        return _filesystem(self.endpoint, self.region)

    def key(self, name: str) -> str:
        """Path of an object in :attr:`filesystem`."""
        return f"{self.bucket}/{self.prefix}{name}"

    def check(self) -> None:
        """List the bucket, so that a mistake is found before any work is done.

        Raises:
            StorageError: the endpoint cannot be reached, refuses the credentials, or has no such bucket.
        """
        with contextlib.suppress(FileNotFoundError):
            self._list("", must_exist=True)

    def put(self, file: Path, name: str) -> None:
        """Upload a file; the object appears complete or not at all.

        Raises:
            StorageError: see :meth:`check`.
        """
        # pyarrow's own copy_files ignores a failure at the end of an upload, which is all there is of a small file.
        with self._explained(), file.open("rb") as source:
            target = self.filesystem.open_output_stream(self.key(name))
            try:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            except BaseException:
                # Closing the stream turns what was written into an object.
                with contextlib.suppress(OSError):
                    target.close()
                    self.filesystem.delete_file(self.key(name))
                raise
            target.close()

    def get(self, name: str, file: Path) -> None:
        """Download an object to a file.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: see :meth:`check`.
        """
        with self._explained(), self.filesystem.open_input_file(self.key(name)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
            if target.tell() != source.size():
                raise StorageError(f"{self}: {name} was cut off after {target.tell()} of {source.size()} bytes")

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """Open an object as a stream, to read only its beginning.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: see :meth:`check`.
        """
        with self._explained(), self.filesystem.open_input_stream(self.key(name), buffer_size=_HEADER_BYTES) as stream:
            yield stream

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of each object directly below ``folder``, by the last part of its name.

        Raises:
            StorageError: see :meth:`check`.
        """
        return {info.base_name: info.size for info in self._list(folder, must_exist=False) if info.is_file}

    def remove(self, name: str) -> None:
        """Remove an object, if it is there.

        Raises:
            StorageError: see :meth:`check`.
        """
        with contextlib.suppress(FileNotFoundError), self._explained():
            self.filesystem.delete_file(self.key(name))

    def _list(self, folder: str, *, must_exist: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.key(folder).rstrip("/"), allow_not_found=not must_exist)
        with self._explained():
            infos: list[Any] = self.filesystem.get_file_info(selector)
        return infos

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise pyarrow's error for a failed request as one sentence; errors of local files pass unchanged."""
        try:
            yield
        except OSError as error:
            if error.errno is not None:
                raise
            raise StorageError(f"{self}: {self._reason(str(error))}") from error

    def _reason(self, text: str) -> str:
        where = self.endpoint or "AWS"
        found = re.search(r"AWS Error ([A-Z_]+)", text)
        code = found[1] if found else ""
        if code == "NETWORK_CONNECTION":
            return f"{where} cannot be reached; run the same command again to continue from what was stored"
        if code == "NO_SUCH_BUCKET":
            return f"no bucket {self.bucket!r} at {where}; make it first, or give another storage"
        if code in _REFUSALS:
            return f"{where} refuses the credentials in the environment ({_CREDENTIALS}; {code})"
        return one_line(text)


@functools.cache
def _filesystem(endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    scheme, _, host = (endpoint or "").rstrip("/").rpartition("://")
    return S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or None,
        region=region,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        # So that a small object takes one request, and a folder none.
        allow_delayed_open=True,
    )
