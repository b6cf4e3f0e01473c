"""URLs to file systems: local paths and any S3-compatible endpoint, for data, checkpoints and runs alike.

Credentials come from the environment or the usual AWS files and are never read, kept or printed here.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import shutil
import ssl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ecocseg.errors import InputError


def join(url: str, *parts: str) -> str:
    """A URL or path with more parts, one slash between each."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def is_remote(url: str) -> bool:
    return "://" in url


@dataclass(frozen=True)
class Storage:
    """How to reach storage. Picklable; file systems are made where they are used.

    Args:
        endpoint: URL of an S3-compatible server (https unless it says http://); None = AWS, or AWS_ENDPOINT_URL(_S3).
        region: region of the bucket; None = AWS_DEFAULT_REGION, or us-east-1.
        path_style: bucket in the path instead of the host name; None = with an endpoint of one's own.
        retries: times a request is tried again.
        anonymous: read public buckets without credentials.
        timeout: seconds without an answer after which a request fails.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    retries: int = 5
    anonymous: bool = False
    timeout: float = 20.0

    def open(self, url: str) -> tuple[pafs.FileSystem, str]:
        """The file system of a URL and the path in it.

        Raises:
            InputError: for a scheme that is neither local nor s3, no bucket, or an endpoint that does not answer.
        """
        scheme, separator, rest = url.partition("://")
        if not separator:
            return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
        if scheme == "file":
            return pafs.LocalFileSystem(), rest
        if scheme != "s3":
            raise InputError(f"{url}: '{scheme}' is not a storage this reads; use a local path or s3://bucket/key")
        path = "/".join(part for part in rest.split("/") if part)
        if not path:
            raise InputError(f"{url} names no bucket; use s3://bucket/key")
        return self._s3(), path

    def _s3(self) -> pafs.FileSystem:
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, Any] = {
            "connect_timeout": min(5.0, self.timeout), "request_timeout": self.timeout,
            "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=self.retries + 1)}
        if endpoint:
            scheme, _, host = endpoint.rpartition("://")
            scheme = scheme or "https"
            if scheme not in ("http", "https"):
                raise InputError(f"storage.endpoint '{endpoint}' is no http:// or https:// URL; correct it")
            _reach(f"{scheme}://{host}", self.retries, min(10.0, self.timeout))
            options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme,
                        "force_virtual_addressing": self.path_style is False}
        region = self.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
        return pafs.S3FileSystem(region=region, anonymous=self.anonymous, **options)

    def read_bytes(self, url: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: when there is none.
            InputError: when it cannot be read for another reason (its bucket does not exist), naming the URL.
        """
        fs, path = self.open(url)
        try:
            with _reading(url), fs.open_input_stream(path) as stream:
                return stream.read()
        except FileNotFoundError:
            if isinstance(fs, pafs.S3FileSystem) and _bucket_is_missing(fs, path):
                raise InputError(f"cannot read {url}: {REMEDIES['NO_SUCH_BUCKET']}") from None
            raise

    @contextlib.contextmanager
    def _create(self, url: str) -> Iterator[BinaryIO]:
        """A file to write that appears when the block ends well, and not at all otherwise."""
        fs, path = self.open(url)
        with _writing(url):
            if isinstance(fs, pafs.LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
                try:
                    with open(temporary, "wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                return
            stream = fs.open_output_stream(path)
            try:
                yield stream
            except BaseException:
                with contextlib.suppress(OSError, pa.ArrowException):  # a stream can only be closed, which makes an object
                    stream.close()
                    fs.delete_file(path)
                raise
            stream.close()  # the object appears when its upload is complete

    def write_bytes(self, url: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all.

        Raises:
            InputError: when it cannot be written, naming the URL.
        """
        with self._create(url) as file:
            file.write(data)

    def exists(self, url: str) -> bool:
        fs, path = self.open(url)
        with _reading(url):
            return fs.get_file_info(path).type != pafs.FileType.NotFound

    def size(self, url: str) -> int | None:
        """Bytes of a file; None when there is none."""
        fs, path = self.open(url)
        with _reading(url):
            info = fs.get_file_info(path)
        return info.size if info.type == pafs.FileType.File else None

    def _list(self, url: str, kind: pafs.FileType, recursive: bool = False) -> list[str]:
        fs, path = self.open(url)
        with _reading(url):
            infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
        return sorted(os.path.relpath(info.path, path) for info in infos if info.type == kind)

    def list_dirs(self, url: str) -> list[str]:
        """Names of the folders in a folder, sorted; empty when it does not exist."""
        return self._list(url, pafs.FileType.Directory)

    def list_files(self, url: str, recursive: bool = False) -> list[str]:
        """Names (or paths below it) of the files in a folder, sorted; empty when it does not exist."""
        return self._list(url, pafs.FileType.File, recursive)

    def delete(self, url: str) -> None:
        """Delete a file, or a folder with all in it; nothing happens when there is none."""
        fs, path = self.open(url)
        with _writing(url), contextlib.suppress(FileNotFoundError):
            info = fs.get_file_info(path)
            if info.type == pafs.FileType.Directory:
                fs.delete_dir(path)
            elif info.type == pafs.FileType.File:
                fs.delete_file(path)

    def upload_dir(self, local: str, url: str) -> None:
        """Copy every file below a local folder under a URL, each whole or not at all."""
        for file in sorted(p for p in Path(local).rglob("*") if p.is_file()):
            with open(file, "rb") as source, self._create(join(url, file.relative_to(local).as_posix())) as target:
                shutil.copyfileobj(source, target, 8 << 20)

    def download_dir(self, url: str, local: str) -> None:
        """Copy every file below a URL into a local folder, each whole or not at all.

        Raises:
            FileNotFoundError: when there is no file below the URL.
        """
        names = self.list_files(url, recursive=True)
        if not names:
            raise FileNotFoundError(f"there is no file below {url}")
        fs, path = self.open(url)
        for name in names:
            with _reading(join(url, name)), fs.open_input_stream(f"{path}/{name}") as source, \
                    self._create(os.path.join(local, name)) as target:
                shutil.copyfileobj(source, target, 8 << 20)

    def check_writable(self, url: str) -> None:
        """Write and delete a small file, with few retries so that what is wrong shows soon.

        Raises:
            InputError: when that fails, with the reason.
        """
        quick = replace(self, retries=min(self.retries, 1), timeout=min(self.timeout, 6.0))
        probe = join(url, f".writable-{uuid.uuid4().hex[:8]}")
        try:
            quick.write_bytes(probe, b"ok")
            quick.delete(probe)
        except InputError as error:
            raise InputError(str(error).replace(probe, url)) from None


@functools.lru_cache(maxsize=64)  # failures are not remembered
def _reach(endpoint: str, retries: int, seconds: float = 10.0) -> None:
    """Ask an endpoint for anything, for about `seconds`: the S3 client itself takes minutes to say that nothing answers.

    Any HTTP answer will do, a refusal too. The question carries no credentials, so certificates are left to the S3 client.

    Raises:
        InputError: when it does not answer.
    """
    parts, deadline = urlsplit(endpoint), time.monotonic() + seconds
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise InputError(f"storage.endpoint '{endpoint}' is no http:// or https:// URL; correct it") from None
    for attempt in range(retries + 1):
        try:
            _ask(parts.scheme, host, port, timeout=max(1.0, min(5.0, deadline - time.monotonic())))
            return
        except (OSError, UnicodeError) as error:
            pause = 0.25 * 2 ** attempt
            if attempt == retries or time.monotonic() + pause > deadline:
                raise InputError(f"the storage endpoint {endpoint} does not answer ({error}); check storage.endpoint or "
                                 "AWS_ENDPOINT_URL") from None
            time.sleep(pause)
        except http.client.HTTPException:
            return  # an answer, if a strange one: the S3 client has more to say about it


def _ask(scheme: str, host: str, port: int | None, timeout: float) -> None:
    connection: http.client.HTTPConnection
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("HEAD", "/")
        connection.getresponse()


def _bucket_is_missing(fs: pafs.FileSystem, path: str) -> bool:
    """Whether the bucket of a path surely does not exist; False when one may not look."""
    try:
        return fs.get_file_info(path.split("/")[0]).type == pafs.FileType.NotFound
    except (OSError, pa.ArrowException):
        return False


@contextlib.contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot write {url}: {reason(error)}") from None


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {url}: {reason(error)}") from None


REMEDIES = {
    "NO_SUCH_BUCKET": "there is no such bucket; make it, or correct its name",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown there; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; set AWS_SECRET_ACCESS_KEY",
    "ACCESS_DENIED": "access is denied; check the credentials in the environment and the bucket's policy",
    "HTTP status 301": "the bucket lies in another region; set storage.region or AWS_DEFAULT_REGION",
    "NETWORK_CONNECTION": "the endpoint does not answer; check storage.endpoint or AWS_ENDPOINT_URL"}
"""What to do, by what the S3 client says."""


def reason(error: Exception) -> str:
    """What went wrong and what to do, for the storage errors people meet."""
    text = str(error)
    for code, remedy in REMEDIES.items():
        if code in text:
            return remedy
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)):
        return f"{error.strerror or text}; give another place, or mend this one"
    return getattr(error, "strerror", None) or (text.splitlines() or [type(error).__name__])[0]
