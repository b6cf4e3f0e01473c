"""URLs to file systems: local paths and any S3-compatible endpoint, for data, checkpoints and runs alike.

Credentials come from the environment or the usual AWS files and are never read, kept or printed here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        endpoint: URL of an S3-compatible server; None = AWS, or AWS_ENDPOINT_URL(_S3).
        region: region of the bucket; None = AWS_DEFAULT_REGION, or us-east-1.
        path_style: bucket in the path instead of the host name; None = with an endpoint of one's own.
        retries: times a request is tried again.
        anonymous: read public buckets without credentials.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    retries: int = 5
    anonymous: bool = False

    def open(self, url: str) -> tuple[pafs.FileSystem, str]:
        """The file system of a URL and the path in it.

        Raises:
            InputError: for a scheme that is neither local nor s3.
        """
        scheme, separator, rest = url.partition("://")
        if not separator:
            return pafs.LocalFileSystem(), os.path.abspath(url)
        if scheme == "file":
            return pafs.LocalFileSystem(), rest
        if scheme != "s3":
            raise InputError(f"{url}: '{scheme}' is not a storage this reads; use a local path or s3://bucket/key")
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict = {"connect_timeout": 5, "request_timeout": 20,
                         "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=self.retries + 1)}
        if endpoint:
            part_scheme, _, host = endpoint.rpartition("://")
            options |= {"endpoint_override": host.rstrip("/"), "scheme": part_scheme or "https"}
            options["force_virtual_addressing"] = self.path_style is False
        region = self.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
        return pafs.S3FileSystem(region=region, anonymous=self.anonymous, **options), rest.rstrip("/")

    def read_bytes(self, url: str) -> bytes:
        """The content of a file. Raises FileNotFoundError when there is none."""
        fs, path = self.open(url)
        with fs.open_input_stream(path) as stream:
            return stream.read()

    def write_bytes(self, url: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all.

        Raises:
            InputError: when it cannot be written, naming the URL.
        """
        fs, path = self.open(url)
        with _writing(url):
            if isinstance(fs, pafs.LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
                try:
                    with open(temporary, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary)
            else:  # an object appears when its upload is complete
                with fs.open_output_stream(path) as stream:
                    stream.write(data)

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
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif info.type == pafs.FileType.File:
            fs.delete_file(path)

    def upload_dir(self, local: str, url: str) -> None:
        """Copy every file below a local folder under a URL."""
        for file in sorted(p for p in Path(local).rglob("*") if p.is_file()):
            self.write_bytes(join(url, file.relative_to(local).as_posix()), file.read_bytes())

    def download_dir(self, url: str, local: str) -> None:
        """Copy every file below a URL into a local folder."""
        fs, path = self.open(url)
        for name in self.list_files(url, recursive=True):
            target = Path(local) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with fs.open_input_stream(f"{path}/{name}") as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)

    def check_writable(self, url: str) -> None:
        """Write and delete a small file.

        Raises:
            InputError: when that fails, with the reason.
        """
        probe = join(url, f".writable-{uuid.uuid4().hex[:8]}")
        self.write_bytes(probe, b"ok")
        self.delete(probe)


@contextlib.contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {url}: {_reason(error)}") from None


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {url}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    """What went wrong and what to do, for the storage errors people meet."""
    text = str(error)
    remedies = {"NO_SUCH_BUCKET": "there is no such bucket; make it, or correct its name",
                "INVALID_ACCESS_KEY_ID": "the access key is unknown there; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; set AWS_SECRET_ACCESS_KEY",
                "ACCESS_DENIED": "access is denied; check the credentials in the environment and the bucket's policy",
                "NETWORK_CONNECTION": "the endpoint does not answer; check storage.endpoint or AWS_ENDPOINT_URL"}
    for code, remedy in remedies.items():
        if code in text:
            return remedy
    return error.strerror or text.splitlines()[0]
