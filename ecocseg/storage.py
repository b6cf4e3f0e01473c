"""URLs to files: local paths and any S3-compatible endpoint, for data, checkpoints and runs alike.

Credentials come from the environment or the usual AWS files and are never read, kept or printed here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ecocseg import google
from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.s3 import S3, S3File

if TYPE_CHECKING:  # torch comes with it, which what only reads does not need
    from ecocseg.tensor_file import TensorFile


def join(url: str, *parts: str) -> str:
    """A URL or path with more parts, one slash between each."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def is_remote(url: str) -> bool:
    return "://" in url


@dataclass(frozen=True)
class Storage:
    """How to reach storage. Picklable; clients are made where they are used.

    Every method may raise, for a URL in a bucket:
        InputError: what a person has to mend (URL, bucket, credentials, policy), with the remedy.
        StorageUnavailable: the server is away or busy, after all tries.

    Args:
        endpoint: URL of an S3-compatible server (https unless it says http://); None = AWS, or AWS_ENDPOINT_URL(_S3).
        region: region of the bucket; None = AWS_DEFAULT_REGION, or us-east-1.
        path_style: bucket in the path instead of the host name; None = with an endpoint of one's own.
        anonymous: read public buckets without credentials.
        retries: times a request is tried again, with pauses of 1/4 s doubled each time, up to 20 s.
        timeout: seconds without an answer after which a try ends.
        deadline: seconds after which a request is not tried again.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    anonymous: bool = False
    retries: int = 10
    timeout: float = 20.0
    deadline: float = 120.0

    def __post_init__(self) -> None:
        if "@" in (self.endpoint or ""):
            raise InputError("storage.endpoint holds a user name or password; take it out, credentials come from "
                             "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the AWS files")

    def soon(self) -> Storage:
        """The same with little patience, to see whether it can be reached at all: a silent server is given 13 s."""
        return replace(self, retries=min(self.retries, 2), timeout=min(self.timeout, 4.0), deadline=min(self.deadline, 15.0))

    def _parse(self, url: str) -> tuple[S3 | None, str, str]:
        """The server, bucket and key of a URL in a bucket; None, "" and the path of a local one."""
        scheme, separator, rest = url.partition("://")
        if not separator:
            return None, "", os.path.abspath(os.path.expanduser(url))
        if scheme == "file":
            return None, "", rest
        if scheme != "s3":
            raise InputError(f"{url}: '{scheme}' is not a storage this reads; use a local path or s3://bucket/key")
        bucket, _, key = "/".join(part for part in rest.split("/") if part).partition("/")
        if not bucket:
            raise InputError(f"{url} names no bucket; use s3://bucket/key")
        if "@" in bucket:
            raise InputError("an s3:// URL holds credentials; use s3://bucket/key, with AWS_ACCESS_KEY_ID and "
                             "AWS_SECRET_ACCESS_KEY or the AWS files")
        return self._s3(), bucket, key

    def _s3(self) -> S3:
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        if endpoint is not None:
            endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
            if not _is_http(endpoint):
                raise InputError(f"storage.endpoint '{endpoint}' is no http:// or https:// URL; correct it")
        region = self.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
        return S3(endpoint, region, self.path_style, self.anonymous, self.retries, self.timeout, self.deadline)

    def open(self, url: str) -> tuple[pafs.FileSystem, str]:
        """pyarrow's file system of a URL and the path in it, for what takes no other, as Ray does."""
        s3, bucket, path = self._parse(url)
        if s3 is None:
            return pafs.LocalFileSystem(), path
        if google.takes_tokens(s3.endpoint, self.anonymous):
            return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=self.deadline)), join(bucket, path).rstrip("/")
        options: dict[str, Any] = {
            "connect_timeout": min(5.0, self.timeout), "request_timeout": self.timeout,
            "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=self.retries + 1)}
        if s3.endpoint:
            scheme, _, host = s3.endpoint.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "force_virtual_addressing": self.path_style is False}
        return pafs.S3FileSystem(region=s3.region, anonymous=self.anonymous, **options), join(bucket, path).rstrip("/")

    def open_file(self, url: str) -> pa.NativeFile | S3File:
        """A file to be read at any place, as Parquet is.

        Raises:
            FileNotFoundError: when there is none.
        """
        s3, bucket, path = self._parse(url)
        return pafs.LocalFileSystem().open_input_file(path) if s3 is None else S3File(s3, bucket, path)

    def read_bytes(self, url: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: when there is none.
            InputError: when it cannot be read for another reason (its bucket does not exist), naming the URL.
        """
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            return b"".join(s3.pieces(bucket, path))
        with _reading(url), open(path, "rb") as file:
            return file.read()

    def write_bytes(self, url: str, data: bytes | TensorFile) -> None:
        """Write a file so that it is there whole or not at all.

        Raises:
            InputError: when it cannot be written, naming the URL.
        """
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            s3.put(bucket, path, data)
            return
        with _new_file(url, path) as file:
            file.writelines([data] if isinstance(data, bytes) else data.pieces())

    def create(self, url: str, data: bytes) -> bool:
        """Write a small file unless there is one; of several who try at once, one is told that it did.

        Raises:
            InputError: when it cannot be written, naming the URL.
        """
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            return s3.create(bucket, path, data)
        with _writing(url):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True

    def exists(self, url: str) -> bool:
        """Whether there is such a file, or a folder with something in it."""
        s3, bucket, path = self._parse(url)
        if s3 is None:
            return os.path.exists(path)
        return (path != "" and s3.size(bucket, path) is not None) or s3.holds(bucket, _folder(path))

    def size(self, url: str) -> int | None:
        """Bytes of a file; None when there is none."""
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            return s3.size(bucket, path) if path else None
        with _reading(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.path.getsize(path) if os.path.isfile(path) else None
        return None

    def list_dirs(self, url: str) -> list[str]:
        """Names of the folders in a folder, sorted; empty when it does not exist."""
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            return sorted(name[len(_folder(path)):].rstrip("/") for name in s3.list(bucket, _folder(path), folders=True)[1])
        return self._local(url, path, pafs.FileType.Directory)

    def list_files(self, url: str, recursive: bool = False) -> list[str]:
        """Names (or paths below it) of the files in a folder, sorted; empty when it does not exist."""
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            return sorted(key[len(_folder(path)):] for key in s3.list(bucket, _folder(path), folders=not recursive)[0])
        return self._local(url, path, pafs.FileType.File, recursive)

    def _local(self, url: str, path: str, kind: pafs.FileType, recursive: bool = False) -> list[str]:
        with _reading(url):
            infos = pafs.LocalFileSystem().get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
        return sorted(os.path.relpath(info.path, path) for info in infos if info.type == kind)

    def delete(self, url: str) -> None:
        """Delete a file, or a folder with all in it; nothing happens when there is none."""
        s3, bucket, path = self._parse(url)
        if s3 is not None:
            if not path:
                raise InputError(f"{url} is a whole bucket, which is not deleted here; name what is in it")
            s3.delete(bucket, [path, f"{path}/", *s3.list(bucket, f"{path}/")[0]])
            return
        with _writing(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def upload_dir(self, local: str, url: str) -> None:
        """Copy every file below a local folder under a URL, each whole or not at all."""
        for file in sorted(p for p in Path(local).rglob("*") if p.is_file()):
            target = join(url, file.relative_to(local).as_posix())
            s3, bucket, path = self._parse(target)
            if s3 is not None:
                s3.put(bucket, path, file)
                continue
            with open(file, "rb") as source, _new_file(target, path) as copy:
                shutil.copyfileobj(source, copy, 8 << 20)

    def download_dir(self, url: str, local: str) -> None:
        """Copy every file below a URL into a local folder, each whole or not at all.

        Raises:
            FileNotFoundError: when there is no file below the URL.
        """
        names = self.list_files(url, recursive=True)
        if not names:
            raise FileNotFoundError(f"there is no file below {url}")
        for name in names:
            s3, bucket, path = self._parse(join(url, name))
            target = os.path.join(local, name)
            with _new_file(target, target) as copy:
                if s3 is not None:
                    copy.writelines(s3.pieces(bucket, path))
                    continue
                with _reading(path), open(path, "rb") as source:
                    shutil.copyfileobj(source, copy, 8 << 20)

    def check(self, url: str) -> None:
        """Ask for a bucket with little patience; what is wrong with endpoint, bucket or credentials shows within 20 s.

        Raises:
            InputError: with the reason. A bucket that may be read but not listed passes.
        """
        s3, bucket, path = self.soon()._parse(url)
        if s3 is not None:
            with _at_once():
                s3.check(bucket, path)

    def credentials(self, url: str) -> str | None:
        """Where the credentials for a bucket come from, never what they are; None for a local path."""
        s3 = self._parse(url)[0]
        return None if s3 is None else s3.credentials()

    def check_writable(self, url: str) -> None:
        """Write and delete a small file, with little patience so that what is wrong shows soon.

        Raises:
            InputError: when that fails, with the reason.
        """
        quick, probe = self.soon(), join(url, f".writable-{uuid.uuid4().hex[:8]}")
        s3, _, path = self._parse(url)
        made = [] if s3 else [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
        try:
            with _at_once():
                quick.write_bytes(probe, b"ok")
                quick.delete(probe)
        except InputError as error:
            raise InputError(str(error).replace(probe, url)) from None
        finally:
            for folder in made:  # a question leaves nothing behind
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _is_http(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _folder(path: str) -> str:
    return f"{path}/" if path else ""


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Before a run begins, storage that cannot be reached is bad input."""
    try:
        yield
    except StorageUnavailable as error:
        raise InputError(str(error)) from None


@contextlib.contextmanager
def _new_file(url: str, path: str) -> Iterator[BinaryIO]:
    """A local file to write that appears when the block ends well, and not at all otherwise."""
    with _writing(url):
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


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def needing_room(path: str) -> Iterator[None]:
    """Make a full disk an InputError that names the path and the remedy, and nothing else: trying again mends no disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"cannot write {path}: {reason(error)}") from None


@contextlib.contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {url}: {reason(error)}") from None


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {url}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What went wrong with a file, and what to do."""
    text = str(error)
    if getattr(error, "errno", None) in NO_ROOM:
        return f"{getattr(error, 'strerror', text)}; free some space there, or give another place, then go on with --resume"
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)):
        return f"{error.strerror or text}; give another place, or mend this one"
    return getattr(error, "strerror", None) or (text.splitlines() or [type(error).__name__])[0]
