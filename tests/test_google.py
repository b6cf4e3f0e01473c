"""Buckets of Google Cloud Storage: tokens instead of signatures, against an S3 server that does not ask for either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
from google.auth.exceptions import DefaultCredentialsError, RefreshError
from moto.server import ThreadedMotoServer

from ecocseg import google, s3
from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.storage import Storage


class Credentials:
    """Google's credentials, whose token is used up by every second request."""

    def __init__(self) -> None:
        self.token, self.made, self.used, self.failing = "", 0, 0, False

    @property
    def valid(self) -> bool:
        self.used += 1
        return not self.failing and self.made > 0 and self.used % 2 == 0

    def refresh(self, request: Any) -> None:
        if self.failing:
            raise RefreshError("the metadata server is away")
        self.made += 1
        self.token = f"token-{self.made}"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server that stands for Google's, its storage, the credentials, and the Authorization of each request."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(google, "HOST", "127.0.0.1")
    credentials = Credentials()
    monkeypatch.setattr("google.auth.default", lambda scopes: (credentials, "project"))
    google._credentials.cache_clear()
    storage = Storage(endpoint=f"http://127.0.0.1:{port}", retries=1)
    seen: list[str] = []
    client = storage._s3().client
    client.meta.events.register("before-send.s3", lambda request, **_: seen.append(request.headers.get("Authorization")))
    client.create_bucket(Bucket="data")
    yield SimpleNamespace(storage=storage, credentials=credentials, seen=seen)
    google._credentials.cache_clear()
    server.stop()


def test_every_request_has_a_token_and_no_signature(account: SimpleNamespace) -> None:
    storage = account.storage
    big = os.urandom(s3.PART_BYTES + 1)
    storage.write_bytes("s3://data/a/big", big)
    storage.write_bytes("s3://data/a/small", b"small")
    assert storage.read_bytes("s3://data/a/big") == big and storage.list_files("s3://data/a") == ["big", "small"]
    with storage.open_file("s3://data/a/big") as file:
        file.seek(7)
        assert file.read(5) == big[7:12]
    storage.check_writable("s3://data/runs")
    storage.delete("s3://data/a")
    assert not storage.exists("s3://data/a")
    assert len(account.seen) > 12
    assert all(str(value).strip("b'").startswith("Bearer token-") for value in account.seen), account.seen
    assert account.credentials.made > 2  # a token that is used up is made anew


def test_keys_sign_and_anonymous_requests_have_nothing(account: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = account.storage.endpoint
    assert google.takes_tokens(endpoint, anonymous=False) and not google.takes_tokens(endpoint, anonymous=True)
    assert not google.takes_tokens("https://minio.lan", anonymous=False) and not google.takes_tokens(None, anonymous=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "GOOG1")
    assert not google.takes_tokens(endpoint, anonymous=False)


def test_what_is_wrong_is_said(account: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    account.credentials.failing = True
    with pytest.raises(StorageUnavailable, match="ConnectionError"):
        account.storage.read_bytes("s3://data/x")
    google._credentials.cache_clear()

    def nobody(scopes: list[str]) -> None:
        raise DefaultCredentialsError("none found")

    monkeypatch.setattr("google.auth.default", nobody)
    with pytest.raises(InputError, match="no credentials; give the machine or pod a service account"):
        account.storage.read_bytes("s3://data/x")


def test_rays_file_system_is_googles_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    filesystem, path = Storage(endpoint="https://storage.googleapis.com").open("s3://bucket/runs/one")
    assert isinstance(filesystem, pafs.GcsFileSystem) and path == "bucket/runs/one"
