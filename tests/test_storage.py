"""Storage: local files whole or not at all; the same calls against a real S3 server; errors that say what to do, soon."""

from __future__ import annotations

import http.client
import io
import os
import pickle
import socket
import stat
import time

import numpy as np
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from PIL import Image

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record, check_files, iter_rows, read_manifest, write_shards
from ecocseg.errors import InputError, StorageUnavailable, run_main
from ecocseg.s3 import PART_BYTES, S3File
from ecocseg.storage import Storage, join


def test_join_puts_one_slash_between_parts():
    assert join("s3://b/k/", "/a/", "c") == "s3://b/k/a/c"
    assert join("data", "x") == "data/x"


def test_local_round_trip_listing_and_delete(tmp_path):
    storage, root = Storage(), str(tmp_path / "new" / "deep")
    storage.write_bytes(join(root, "a", "x.bin"), b"one")
    storage.write_bytes(join(root, "y.bin"), b"four")
    storage.write_bytes(join(root, "y.bin"), b"fourth")
    assert storage.read_bytes(join(root, "y.bin")) == b"fourth"
    assert storage.read_bytes(f"file://{root}/y.bin") == b"fourth"
    assert storage.size(join(root, "y.bin")) == 6 and storage.size(root) is None and storage.size(join(root, "no")) is None
    assert storage.list_dirs(root) == ["a"] and storage.list_files(root) == ["y.bin"]
    assert storage.list_files(root, recursive=True) == ["a/x.bin", "y.bin"]
    assert storage.list_files(join(root, "no")) == []
    storage.delete(join(root, "a"))
    storage.delete(join(root, "y.bin"))
    storage.delete(join(root, "never was"))
    assert not storage.exists(join(root, "a")) and storage.list_files(root, recursive=True) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(join(root, "y.bin"))


def test_a_failed_local_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    storage, url = Storage(), str(tmp_path / "f.bin")
    storage.write_bytes(url, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="f.bin: No space left"):
        storage.write_bytes(url, b"new and longer")
    assert (tmp_path / "f.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["f.bin"]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*/file/run: .*give another place"):
        Storage().check_writable(str(tmp_path / "file" / "run"))
    Storage().check_writable(str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["file"]  # a question leaves nothing behind


@pytest.mark.parametrize(("url", "message"), [("gs://b/k", "'gs' is not a storage"), ("s3://", "names no bucket")])
def test_urls_that_are_none(url, message):
    with pytest.raises(InputError, match=message):
        Storage().open(url)


def test_upload_and_download_a_folder(tmp_path):
    check_copies(Storage(), str(tmp_path / "there"), tmp_path)


def test_storage_is_picklable_and_keeps_no_credentials(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    data = pickle.dumps(Storage(endpoint="http://x", retries=2))
    assert pickle.loads(data) == Storage(endpoint="http://x", retries=2) and b"secret-of-mine" not in data


def check_copies(storage: Storage, url: str, tmp_path):
    source = tmp_path / "from"
    (source / "sub").mkdir(parents=True)
    files = {"a.txt": b"a" * 10, "sub/b.bin": bytes(range(256)) * 50_000}
    for name, data in files.items():
        (source / name).write_bytes(data)
    os.chmod(source / "a.txt", stat.S_IRUSR)
    storage.upload_dir(str(source), url)
    assert storage.list_files(url, recursive=True) == sorted(files)
    back = tmp_path / "back"
    storage.download_dir(url, str(back))
    assert {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()} == files
    with pytest.raises(FileNotFoundError, match="no file below"):
        storage.download_dir(join(url, "nothing"), str(back))


@pytest.fixture(scope="module")
def server():
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


def ask(server, method, path, body=None):
    connection = http.client.HTTPConnection(server, timeout=10)
    connection.request(method, path, body, {"Content-Type": "text/plain"})
    status = connection.getresponse().status
    connection.close()
    assert status == 200


@pytest.fixture
def s3(server, monkeypatch):
    """Storage on a server with one bucket; its address comes from the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
                        "AWS_ENDPOINT_URL": f"http://{server}"}.items():
        monkeypatch.setenv(name, value)
    ask(server, "POST", "/moto-api/reset")
    ask(server, "PUT", "/bucket")
    yield Storage()
    ask(server, "POST", "/moto-api/reset-auth", b"1000000")


def test_s3_round_trip_listing_and_delete(s3):
    s3.write_bytes("s3://bucket/run//a/x.bin", b"one")  # doubled slashes are one
    s3.write_bytes("s3://bucket/run/y.bin", b"four")
    assert s3.read_bytes("s3://bucket/run/a/x.bin") == b"one"
    assert s3.size("s3://bucket/run/y.bin") == 4 and s3.size("s3://bucket/run/no") is None
    assert s3.list_dirs("s3://bucket/run") == ["a"] and s3.list_files("s3://bucket/run") == ["y.bin"]
    assert s3.list_files("s3://bucket/run", recursive=True) == ["a/x.bin", "y.bin"]
    assert s3.list_files("s3://bucket/no") == []
    s3.check_writable("s3://bucket/other")
    assert s3.list_files("s3://bucket/other", recursive=True) == []
    s3.delete("s3://bucket/run")
    s3.delete("s3://bucket/never-was")
    assert not s3.exists("s3://bucket/run/y.bin") and s3.list_files("s3://bucket", recursive=True) == []
    with pytest.raises(FileNotFoundError):
        s3.read_bytes("s3://bucket/run/y.bin")


def test_s3_endpoint_as_argument(server, s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    Storage(endpoint=f"http://{server}/").write_bytes("s3://bucket/k", b"v")
    assert Storage(endpoint=f"http://{server}").read_bytes("s3://bucket/k") == b"v"


def test_s3_upload_and_download_a_folder(s3, tmp_path):
    check_copies(s3, "s3://bucket/copies", tmp_path)


def test_s3_shards_round_trip_and_damage_is_named(s3):
    def png(array):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()

    rng, classes = np.random.default_rng(0), CLASS_LISTS["camvid"]
    records = [Record(f"im{i}", png(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)),
                      png(rng.integers(0, 11, (8, 12), dtype=np.uint8))) for i in range(7)]
    url = "s3://bucket/sets/day"
    made = write_shards(records, url, dataset="camvid", classes=classes, row_group_rows=2, shard_bytes=2000, storage=s3)
    manifest = read_manifest(url, s3)
    assert manifest == made and manifest.num_labeled == 7 and len(manifest.files) > 1
    check_files(manifest, s3, checksums=True)
    rows = [row for rank in range(2) for row in iter_rows(manifest, rank, 2, storage=s3)]
    assert {r["image_id"]: (r["image"], r["mask"]) for r in rows} == {r.image_id: (r.image, r.mask) for r in records}
    broken, lost = manifest.files[0].name, manifest.files[1].name
    data = bytearray(s3.read_bytes(join(url, broken)))
    data[100] ^= 1
    s3.write_bytes(join(url, broken), bytes(data))
    s3.delete(join(url, lost))
    with pytest.raises(InputError, match=rf"(?s){broken} was changed.*{lost} is missing"):
        check_files(manifest, s3, checksums=True)


def test_manifest_out_of_reach_is_not_called_damaged(server, s3):
    with pytest.raises(InputError, match="no shards at s3://bucket/none: manifest.json is missing"):
        read_manifest("s3://bucket/none", s3)
    with pytest.raises(InputError, match=r"s3://nowhere/day/manifest.json: there is no such bucket"):
        read_manifest("s3://nowhere/day", s3)
    ask(server, "POST", "/moto-api/reset-auth", b"0")
    with pytest.raises(InputError, match="cannot read .*(the access key is unknown|access is denied)"):
        read_manifest("s3://bucket/day", s3)


def test_s3_large_files_go_up_in_parts_and_a_failed_upload_leaves_the_old_one(s3, tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(2 * PART_BYTES + 12345)
    s3.write_bytes("s3://bucket/large", data)
    assert s3.read_bytes("s3://bucket/large") == data and s3.size("s3://bucket/large") == len(data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "large").write_bytes(data[::-1])
    s3.upload_dir(str(tmp_path), "s3://bucket/copy")
    assert s3.read_bytes("s3://bucket/copy/sub/large") == data[::-1]
    client = s3._s3().client

    def full(**what):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(client, "upload_part", full)
    with pytest.raises(StorageUnavailable, match="cannot write s3://bucket/large: ConnectionResetError"):
        Storage(retries=0).write_bytes("s3://bucket/large", b"new" * PART_BYTES)
    assert s3.read_bytes("s3://bucket/large") == data
    assert not client.list_multipart_uploads(Bucket="bucket").get("Uploads")


def test_s3_files_are_read_at_any_place_in_pieces_and_empty(s3, monkeypatch):
    data = np.random.default_rng(1).bytes(300_000)
    s3.write_bytes("s3://bucket/f", data)
    file = s3.open_file("s3://bucket/f")
    assert isinstance(file, S3File) and file.seek(0, os.SEEK_END) == len(data)
    for first, size in ((0, 10), (1000, 200_000), (290_000, 50_000), (200_000, 100_000), (300_000, 5)):
        file.seek(first)
        assert file.read(size) == data[first:first + size] and file.tell() == min(first + size, len(data))
    s3.write_bytes("s3://bucket/f", data[::-1])
    file.seek(0)
    with pytest.raises(StorageUnavailable, match="PreconditionFailed"):  # never bytes of two versions
        Storage(retries=0).open_file("s3://bucket/f")._s3.fetch("bucket", "f", "0-9", file._etag)
    monkeypatch.setattr("ecocseg.s3.PIECE_BYTES", 70_000)
    assert s3.read_bytes("s3://bucket/f") == data[::-1]
    s3.write_bytes("s3://bucket/empty", b"")
    assert s3.read_bytes("s3://bucket/empty") == s3.open_file("s3://bucket/empty").read() == b""
    assert s3.exists("s3://bucket/empty") and s3.size("s3://bucket/empty") == 0
    with pytest.raises(FileNotFoundError):
        s3.open_file("s3://bucket/no")


def test_s3_folders_of_more_than_a_page(s3, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")
    for index in range(11):
        s3.write_bytes(f"s3://bucket/many/{index:02d}/x", b"")
    s3.write_bytes("s3://bucket/many-others", b"")
    assert len(s3._s3().client.list_objects_v2(Bucket="bucket", Prefix="many/")["Contents"]) == 4
    assert s3.list_dirs("s3://bucket/many") == [f"{index:02d}" for index in range(11)]
    assert s3.list_files("s3://bucket/many", recursive=True) == [f"{index:02d}/x" for index in range(11)]
    assert s3.list_files("s3://bucket/many") == [] and s3.list_files("s3://bucket") == ["many-others"]
    s3.delete("s3://bucket/many")
    assert s3.list_files("s3://bucket", recursive=True) == ["many-others"]
    with pytest.raises(InputError, match="whole bucket"):
        s3.delete("s3://bucket")


def test_s3_missing_bucket_says_so(s3):
    with pytest.raises(InputError, match=r"cannot write s3://nowhere/run: there is no such bucket; make it"):
        s3.check_writable("s3://nowhere/run")
    with pytest.raises(InputError, match=r"cannot read s3://nowhere/run: there is no such bucket; make it"):
        s3.read_bytes("s3://nowhere/run")
    with pytest.raises(InputError, match=r"cannot read s3://nowhere/run: there is no such bucket; make it"):
        s3.check("s3://nowhere/run")
    with pytest.raises(InputError, match="there can be no such bucket"):
        s3.read_bytes("s3://a b/run")


def test_s3_bad_credentials_say_so_and_are_not_printed(server, s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    ask(server, "POST", "/moto-api/reset-auth", b"0")
    for call in (s3.check_writable, s3.read_bytes, s3.exists, s3.list_files, s3.delete):
        with pytest.raises(InputError, match=r"s3://bucket/run: (the access key is unknown|access is denied)") as caught:
            call("s3://bucket/run")
        assert "secret-of-mine" not in str(caught.value)


def test_s3_no_credentials_say_so_and_public_buckets_need_none(server, s3, monkeypatch, tmp_path):
    s3._s3().client.put_object(Bucket="bucket", Key="public", Body=b"for all", ACL="public-read")
    s3.write_bytes("s3://bucket/private", b"for few")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for call in (s3.check, s3.check_writable, s3.read_bytes):
        with pytest.raises(InputError, match="s3://bucket/public: there are no credentials; set AWS_ACCESS_KEY_ID"):
            call("s3://bucket/public")
    assert Storage(anonymous=True).read_bytes("s3://bucket/public") == b"for all"
    Storage(anonymous=True).check("s3://bucket/public")  # which one may not list
    with pytest.raises(InputError, match="s3://bucket/private: access is denied"):
        Storage(anonymous=True).read_bytes("s3://bucket/private")


@pytest.fixture
def dead():
    with socket.socket() as reserved:  # bound, not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def silent():
    with socket.socket() as taken:  # takes connections, never answers
        taken.bind(("127.0.0.1", 0))
        taken.listen(16)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("call", ["check_writable", "check"])
@pytest.mark.parametrize("endpoint", ["dead", "silent"])
def test_before_a_run_an_endpoint_that_does_not_answer_is_bad_input_soon(s3, request, endpoint, call, monkeypatch):
    url, pauses, tries = request.getfixturevalue(endpoint), [], []
    monkeypatch.setattr(time, "sleep", pauses.append)
    soon = Storage(endpoint=url).soon()
    assert (soon.retries + 1) * soon.timeout + sum(0.25 * 2 ** n for n in range(soon.retries)) < 14
    monkeypatch.setattr(Storage, "soon", lambda self: tries.append(1) or Storage(endpoint=url, retries=2, timeout=0.2))
    with pytest.raises(InputError, match=rf"cannot .* s3://bucket/run: .*endpoint {url} does not answer .*storage.endpoint"):
        getattr(Storage(endpoint=url), call)("s3://bucket/run")
    assert len(tries) == 1 and len(pauses) == 2


@pytest.mark.parametrize("call", ["read_bytes", "exists", "list_files", "delete", "open_file"])
def test_during_a_run_it_is_no_bad_input_and_tried_again(s3, dead, call, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(StorageUnavailable, match=rf"endpoint {dead} does not answer \(6 tries") as caught:
        getattr(Storage(endpoint=dead, retries=5), call)("s3://bucket/run")
    assert not isinstance(caught.value, (OSError, InputError))
    assert all(0.5 <= pause / (0.25 * 2 ** n) <= 1 for n, pause in enumerate(pauses)) and len(pauses) == 5

    def fail():
        raise caught.value

    assert run_main(fail) == 1 and "does not answer" in capsys.readouterr().err


def test_no_try_begins_after_the_deadline(s3, dead, monkeypatch):
    passed = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))
    with pytest.raises(StorageUnavailable, match="does not answer"):
        Storage(endpoint=dead, retries=1000, deadline=60).read_bytes("s3://bucket/run")
    assert 40 <= passed[0] <= 60


def test_credentials_in_urls_are_refused_and_not_printed(s3):
    for make in (lambda: Storage(endpoint="http://me:secret-of-mine@127.0.0.1:1"),
                 lambda: s3.read_bytes("s3://me:secret-of-mine@bucket/k")):
        with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID") as caught:
            make()
        assert "secret-of-mine" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_endpoint_that_is_no_url(s3, endpoint):
    with pytest.raises(InputError, match="is no http"):
        Storage(endpoint=endpoint).read_bytes("s3://bucket/run")


def test_a_refusal_says_where_the_credentials_are_from_and_not_what_they_are(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENTIFIER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")

    def refused():
        raise ClientError({"Error": {"Code": "InvalidAccessKeyId"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")

    s3 = Storage(endpoint="http://127.0.0.1:1")._s3()
    with pytest.raises(InputError) as caught:
        s3.persist("read s3://bucket/key", refused)
    assert "the access key is unknown there" in str(caught.value)
    assert "(credentials: the environment (AWS_ACCESS_KEY_ID))" in str(caught.value)
    assert "AKIDENTIFIER" not in str(caught.value) and "verysecret" not in str(caught.value)
    assert Storage(anonymous=True).credentials("s3://bucket/key") == "nowhere: anonymous"
    assert Storage().credentials("/local/path") is None
