"""Every command takes the settings of a bucket in one way."""

from __future__ import annotations

import argparse

import pytest
from conftest import load_job

from ecocseg.config import StorageConfig
from ecocseg.errors import InputError
from ecocseg.storage import Storage
from ecocseg.storage_options import add_storage_arguments, storage_of

GIVEN = ["--endpoint", "http://here:9000", "--storage", "path_style=false", "--storage", "retries=2"]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_storage_arguments(parser)
    return parser.parse_args(words)


def test_every_key_of_the_storage_block_can_be_given() -> None:
    values = {"endpoint": "http://x", "region": "eu-1", "path_style": "true", "anonymous": "true", "retries": "3",
              "timeout": "1.5", "deadline": "9"}
    assert values.keys() == StorageConfig.model_fields.keys()
    words = [word for key, value in values.items() for word in ("--storage", f"{key}={value}")]
    assert storage_of(parsed(*words)) == Storage("http://x", "eu-1", True, True, 3, 1.5, 9.0)


def test_what_is_given_replaces_what_a_run_has_and_leaves_the_rest() -> None:
    run = StorageConfig(region="eu-1", retries=5, endpoint="http://there")
    assert storage_of(parsed(), run) == Storage("http://there", "eu-1", retries=5)
    assert storage_of(parsed(*GIVEN), run) == Storage("http://here:9000", "eu-1", path_style=False, retries=2)


@pytest.mark.parametrize(("word", "says"), [
    ("retrys=3", "retrys: no such key; did you mean 'retries'"), ("retries=-1", "retries"), ("retries", "not key=value")])
def test_bad_settings_are_named(word: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        storage_of(parsed("--storage", word))


@pytest.mark.parametrize(("job", "words"), [
    ("evaluate", ["run", "--data", "d"]), ("predict", ["run", "images", "--out", "o"]),
    ("pseudo_label", ["run", "pool", "--out", "o"])])
def test_commands_that_use_a_checkpoint_take_them(job: str, words: list[str]) -> None:
    options = load_job(job).parse([*words, *GIVEN])
    assert storage_of(options) == Storage("http://here:9000", path_style=False, retries=2)


def test_packing_and_reports_take_them() -> None:
    parser = load_job("prepare_shards").build_parser()
    for words in (["check", "url"], ["demo", "--out", "o"], ["camvid", "root", "--out", "o"]):
        assert storage_of(parser.parse_args([*words, *GIVEN])) == Storage("http://here:9000", path_style=False, retries=2)
    with pytest.raises(InputError, match="there is no run"):
        load_job("report").main(["/nowhere", *GIVEN])
