"""Objects in buckets of any S3-compatible server: every request is tried again with back-off, up to a deadline.

boto3 reads too, not only pyarrow's client: given an answer that is cut off, pyarrow 26 hands out fewer bytes than there
are without a word, and on Linux its request timeout does not end a stalled one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ecocseg import google
from ecocseg.errors import InputError, StorageUnavailable

if TYPE_CHECKING:  # torch comes with it, which what only reads does not need
    from ecocseg.tensor_file import TensorFile

Answer = TypeVar("Answer")
PIECE_BYTES = 32 << 20
"""Most bytes one request of a whole file fetches, so that a fault costs no more than these."""
PART_BYTES = 16 << 20
"""Bytes of a part of an upload; smaller files are one request."""
MOST_PARTS = 10_000
UPLOAD_THREADS = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""Seconds before the first and at most before a later new try; doubled each time, and shortened by up to half at random."""
TAIL_BYTES = 64 << 10
"""End of a file that is fetched as it is opened: a Parquet footer, as a rule."""
TRANSIENT = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
             "TooManyRequests", "OperationAborted", "IncompleteBody", "BadDigest", "PreconditionFailed"}
REMEDIES = {
    "NoSuchBucket": "there is no such bucket; make it, or correct its name",
    "InvalidBucketName": "there can be no such bucket; correct its name",
    "InvalidAccessKeyId": "the access key is unknown there; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "the secret key is wrong; set AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; set AWS_SESSION_TOKEN and its keys anew",
    "InvalidToken": "the session token is not valid there; set or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": "the bucket lies in another region; set storage.region or AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region; set storage.region or AWS_DEFAULT_REGION",
    "AccessDenied": "access is denied; check the credentials in the environment and the bucket's policy"}
"""What to do, by what the server says."""
ABOUT_CREDENTIALS = [REMEDIES[code] for code in (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccessDenied")]
SOURCES = {"env": "the environment (AWS_ACCESS_KEY_ID)", "shared-credentials-file": "the AWS credentials file",
           "config-file": "the AWS config file", "iam-role": "the machine's role", "container-role": "the container's role",
           "assume-role": "a role that is assumed", "assume-role-with-web-identity": "a role by web identity", "sso": "SSO"}
"""Where boto3 found credentials, in words."""
NO_CREDENTIALS = ("there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), or "
                  "storage.anonymous=true for a public bucket")


def user_error(error: Exception) -> str | None:
    """What a person did wrong and should do; None for an error that may pass."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code, status = _code(error)
        if code in TRANSIENT or status >= 500 or status in (408, 429):
            return None
        code = {"301": "PermanentRedirect", "403": "AccessDenied", "Forbidden": "AccessDenied"}.get(code, code)
        return REMEDIES.get(code) or f"the server refuses it ({code}, HTTP status {status}); check the URL and storage.*"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return NO_CREDENTIALS
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "the server's certificate is not trusted here; set AWS_CA_BUNDLE, or correct storage.endpoint"
    if isinstance(error, boto.ParamValidationError):
        return "there can be no such bucket or key; correct the URL"
    passing = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.CredentialRetrievalError,
               boto.MetadataRetrievalError)
    if isinstance(error, boto.BotoCoreError) and not isinstance(error, passing):
        return f"{error}; check the AWS files and variables"
    return None


class CutOff(ConnectionError):
    """An answer that ended in its head; Python's HTTP client takes that for its end."""


def _field(answer: dict[str, Any], name: str) -> Any:
    """What every whole answer of its kind has."""
    if name not in answer:
        raise CutOff
    return answer[name]


def _total(answer: dict[str, Any], span: str, got: int) -> int:
    """Size of the whole object of which an answer gave `got` bytes; bytes show that the head before them was whole."""
    if answer.get("ContentLength") != got:
        raise CutOff
    total = answer.get("ContentRange", "").rpartition("/")[2]
    if not total.isdigit() and got and not span.startswith("0-"):
        raise CutOff
    return int(total) if total.isdigit() else got  # no range: an empty object, or all of it from a server without ranges


def _code(error: Any) -> tuple[str, int]:
    """The error code and the HTTP status of a refusal."""
    answer = error.response
    return str(answer.get("Error", {}).get("Code", "")), int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@functools.lru_cache(maxsize=32)
def _client(endpoint: str | None, region: str, path_style: bool | None, anonymous: bool, timeout: float,
            credentials: int, tokens: bool) -> Any:
    """A client, which many threads may use; `credentials` makes it a new one when those in the environment change."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import InvalidRegionError

    style = {True: "path", False: "virtual", None: "path" if endpoint else "auto"}[path_style]
    config = Config(
        connect_timeout=min(5.0, timeout), read_timeout=timeout, retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": style}, max_pool_connections=32, signature_version=UNSIGNED if anonymous or tokens else None,
        request_checksum_calculation="when_required", response_checksum_validation="when_required")  # not all servers have more
    session = boto3.session.Session()
    try:
        client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except InvalidRegionError:
        raise InputError(f"storage.region '{region}' is no region's name; correct it or AWS_DEFAULT_REGION") from None
    except ValueError:
        raise InputError(f"storage.endpoint '{endpoint}' is no http:// or https:// URL; correct it") from None
    if tokens:
        client.meta.events.register("before-sign.s3", google.authorize)
    return client


@dataclass(frozen=True)
class S3:
    """A server and how long to try; see `ecocseg.storage.Storage` for the fields. Keys are without a leading slash."""

    endpoint: str | None
    region: str
    path_style: bool | None
    anonymous: bool
    retries: int
    timeout: float
    deadline: float

    @property
    def client(self) -> Any:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
        return _client(self.endpoint, self.region, self.path_style, self.anonymous, min(self.timeout, self.deadline),
                       hash(tuple(os.environ.get(name) for name in names)),
                       google.takes_tokens(self.endpoint, self.anonymous))

    def persist(self, doing: str, request: Callable[[], Answer]) -> Answer:
        """The answer to a request, tried again while what goes wrong may pass.

        Raises:
            FileNotFoundError: when the server has no such object.
            InputError: for what a person has to mend, beginning with `doing`.
            StorageUnavailable: when the tries or the time are up.
        """
        started, pause = time.monotonic(), FIRST_PAUSE
        for number in range(self.retries + 1):
            try:
                return request()
            except (InputError, FileNotFoundError):
                raise
            except Exception as error:
                remedy = self._look_at(doing, error)
                if remedy is not None:
                    source = f" (credentials: {self.credentials()})" if remedy in ABOUT_CREDENTIALS else ""
                    raise InputError(f"cannot {doing}: {remedy}{source}") from None
                wait = pause * _JITTER.uniform(0.5, 1)
                if number == self.retries or time.monotonic() + wait > started + self.deadline:
                    raise StorageUnavailable(self._away(doing, error, number + 1, time.monotonic() - started)) from None
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _look_at(self, doing: str, error: Exception) -> str | None:
        """The remedy of a user's error, None for one that may pass.

        Raises:
            FileNotFoundError: when the server has no such object.
        """
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        if isinstance(error, boto.ClientError) and _code(error)[0] in ("NoSuchKey", "404", "NotFound"):
            raise FileNotFoundError(f"cannot {doing}: there is no such object") from None
        known = (boto.BotoCoreError, boto.ClientError, ResponseParserError, OSError, HTTPException, HTTPError)
        if isinstance(error, known):  # the last two: boto3 lets through what befalls it while it reads a refusal
            return user_error(error)
        raise error

    def _away(self, doing: str, error: Exception, tries: int, seconds: float) -> str:
        from botocore import exceptions as boto

        tried = f"{tries} tries in {seconds:.0f} s"
        if isinstance(error, boto.ClientError):
            return f"cannot {doing}: the server answers {_code(error)[0]} ({tried})"
        if isinstance(error, boto.ConnectionError | boto.HTTPClientError):
            return (f"cannot {doing}: the storage endpoint {self.endpoint or 'of AWS'} does not answer ({tried}; "
                    f"{type(error).__name__}); check storage.endpoint or AWS_ENDPOINT_URL, and the network")
        return f"cannot {doing}: {type(error).__name__} ({tried})"

    def fetch(self, bucket: str, key: str, span: str, etag: str | None = None) -> tuple[bytes, int, str]:
        """Bytes of a `span` ("0-99", "100-", "-50" for the last 50), the size of the whole object and its etag.

        With `etag`, an object that has been replaced since is refused.
        """
        more = {"IfMatch": etag} if etag else {}

        def request() -> tuple[bytes, int, str]:
            try:
                answer = self.client.get_object(Bucket=bucket, Key=key, Range=f"bytes={span}", **more)
            except Exception as error:
                if getattr(error, "response", None) is not None and _code(error)[0] in ("InvalidRange", "416"):
                    return b"", 0, ""  # an empty object has no byte to give
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            return data, _total(answer, span, len(data)), _field(answer, "ETag")

        return self.persist(f"read s3://{bucket}/{key}", request)

    def pieces(self, bucket: str, key: str) -> Iterator[bytes]:
        """The content of an object, a piece at a time."""
        data, total, etag = self.fetch(bucket, key, f"0-{PIECE_BYTES - 1}")
        yield data
        have = len(data)
        while have < total:
            data, total, etag = self.fetch(bucket, key, f"{have}-{have + PIECE_BYTES - 1}", etag)
            yield data
            have += len(data)

    def put(self, bucket: str, key: str, source: bytes | Path | TensorFile) -> None:
        """Write an object that is there whole, or as before."""
        doing, size = f"write s3://{bucket}/{key}", source.stat().st_size if isinstance(source, Path) else len(source)
        if size <= PART_BYTES:
            body = _span(source, 0, size)
            self.persist(doing, lambda: self.client.put_object(Bucket=bucket, Key=key, Body=body))
            return
        target = {"Bucket": bucket, "Key": key}
        target["UploadId"] = self.persist(doing, lambda: _field(self.client.create_multipart_upload(**target), "UploadId"))
        step = max(PART_BYTES, -(-size // MOST_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = _span(source, (number - 1) * step, step)
            etag = self.persist(doing, lambda: _field(
                self.client.upload_part(**target, PartNumber=number, Body=body), "ETag"))
            return {"PartNumber": number, "ETag": etag}

        pool = ThreadPoolExecutor(UPLOAD_THREADS)
        try:
            parts = list(pool.map(send, range(1, -(-size // step) + 1)))
            self.persist(doing, lambda: self._complete(target, parts, size))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with contextlib.suppress(Exception):  # what stays behind is no object; bucket rules clean it up
                self.client.abort_multipart_upload(**target)
            raise
        finally:
            pool.shutdown()

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        """Write an object unless there is one. False may also mean that a try whose answer was lost did write it."""
        def request() -> bool:
            try:
                self.client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except Exception as error:
                refused = getattr(error, "response", None) is not None and _code(error)
                if refused and (refused[0] in ("PreconditionFailed", "ConditionalRequestConflict") or refused[1] == 412):
                    return False
                if refused and (refused[0] == "NotImplemented" or refused[1] == 501):  # a server without conditions
                    self.client.put_object(Bucket=bucket, Key=key, Body=data)
                    return True
                raise
            return True

        return self.persist(f"write s3://{bucket}/{key}", request)

    def credentials(self) -> str:
        """Where the credentials of requests come from; never what they are."""
        if self.anonymous:
            return "nowhere: anonymous"
        if google.takes_tokens(self.endpoint, self.anonymous):
            return "Google's own, for this machine's account"
        import boto3

        found = boto3.session.Session().get_credentials()
        return "nowhere: none found" if found is None else SOURCES.get(found.method, found.method)

    def _complete(self, target: dict[str, Any], parts: list[dict[str, Any]], size: int) -> None:
        try:
            _field(self.client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}), "ETag")
        except Exception as error:
            gone = getattr(error, "response", None) is not None and _code(error)[0] == "NoSuchUpload"
            if not gone or self.size(target["Bucket"], target["Key"]) != size:
                raise  # else an earlier try was done and only its answer was lost

    def size(self, bucket: str, key: str) -> int | None:
        """Bytes of an object; None when there is none.

        Its first byte is asked for with it: a head alone, without a body after it, may be cut off in the middle of a number.
        """
        try:
            return self.fetch(bucket, key, "0-0")[1]
        except FileNotFoundError:
            return None

    def holds(self, bucket: str, prefix: str) -> bool:
        """Whether any key begins with a prefix."""
        return bool(self._page(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents"))

    def check(self, bucket: str, prefix: str) -> None:
        """The cheapest question whose answer tells what is wrong with a bucket or with credentials."""
        try:
            self.holds(bucket, prefix)
        except InputError as error:
            if REMEDIES["AccessDenied"] not in str(error):  # one may be allowed to read what one may not list
                raise

    def _page(self, **what: Any) -> dict[str, Any]:
        """An answer to list_objects_v2, which has its last field: one cut off would be an empty folder."""
        def request() -> dict[str, Any]:
            answer = self.client.list_objects_v2(**what)
            _field(answer, "IsTruncated")
            return answer

        return self.persist(f"read s3://{what['Bucket']}/{what['Prefix']}".rstrip("/"), request)

    def list(self, bucket: str, prefix: str, folders: bool = False) -> tuple[list[str], list[str]]:
        """Keys below a prefix; with `folders` only those directly below it, and the folders beside them."""
        keys: list[str] = []
        below: list[str] = []
        more: dict[str, str] = {"Delimiter": "/"} if folders else {}
        while True:
            answer = self._page(Bucket=bucket, Prefix=prefix, **more)
            keys += [entry["Key"] for entry in answer.get("Contents", []) if not entry["Key"].endswith("/")]
            below += [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]
            if not answer["IsTruncated"]:
                return keys, below
            more["ContinuationToken"] = answer["NextContinuationToken"]

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are none to delete."""
        def request(some: Sequence[str]) -> None:
            answer = self.client.delete_objects(Bucket=bucket, Delete={
                "Objects": [{"Key": key} for key in some]})
            if len(answer.get("Errors", [])) + len(answer.get("Deleted", [])) < len(some):
                raise CutOff
            errors = [error for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]  # Google's answer
            if errors:
                from botocore.exceptions import ClientError

                raise ClientError({"Error": errors[0]}, "DeleteObjects")

        for first in range(0, len(keys), 1000):
            some = keys[first:first + 1000]
            self.persist(f"write s3://{bucket}/{some[0]}", functools.partial(request, some))


_JITTER = random.Random()
"""Apart from the random numbers of training, which it must not move."""


def _span(source: bytes | Path | TensorFile, first: int, size: int) -> bytes:
    if isinstance(source, bytes):
        return source[first:first + size]
    if not isinstance(source, Path):
        return source.read(first, size)
    with open(source, "rb") as file:
        file.seek(first)
        return file.read(size)


class S3File(io.RawIOBase):
    """An object to be read at any place; each read is one request. Its end is fetched as it is opened."""

    def __init__(self, s3: S3, bucket: str, key: str) -> None:
        self._s3, self._bucket, self._key, self._at = s3, bucket, key, 0
        self._tail, self._size, self._etag = s3.fetch(bucket, key, f"-{TAIL_BYTES}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        first = self._at
        end = self._size if size is None or size < 0 else min(self._size, first + size)
        if first >= end:
            return b""
        known = self._size - len(self._tail)
        if first >= known:
            data = self._tail[first - known:end - known]
        else:
            data = self._s3.fetch(self._bucket, self._key, f"{first}-{end - 1}", self._etag)[0]
        self._at += len(data)
        return data
