"""What a person types: lists, printed configurations, dry runs, and bad input that ends with exit code 2 and a remedy."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import tiny_plain, write_tiny

from ecocseg.cli import main
from ecocseg.config import recipe_names
from ecocseg.errors import run_main


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command line."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            code = run_main(lambda: main("test", "demo", list(arguments)))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, output.getvalue()


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_plain(tiny, tmp_path / "runs", data__loader="ray")))
    return path


def test_list_names_every_recipe_and_help_every_key() -> None:
    code, output = command("--list")
    assert code == 0 and all(name in output for name in recipe_names())
    code, output = command("--help")
    assert code == 0 and "coding.reliability" in output and "demo" in output


def test_printed_configuration_runs_again(config: Path, tmp_path: Path) -> None:
    code, output = command("--config", str(config), "--print-config", "train.steps=9")
    assert code == 0
    (tmp_path / "again.yaml").write_text(output)
    assert command("--config", str(tmp_path / "again.yaml"), "--print-config") == (0, output)


def test_dry_run_checks_and_trains_nothing(config: Path, tmp_path: Path) -> None:
    code, output = command("--config", str(config), "--dry-run")
    assert code == 0 and "all checks passed" in output and "M parameters" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arguments", "says"), [
    (["--recipe", "dem"], ["no recipe 'dem'", "demo"]),
    (["train.stepz=1"], ["train.stepz", "train.steps"]),
    (["train.steps=lots"], ["train.steps", "lots"]),
    (["coding.codebook.length=1"], ["4 classes need at least 2 bits"]),
    (["launch.workers=500"], ["launch.workers", "500"]),
    (["launch.gpu=true"], ["launch.gpu", "no GPU"]),
    (["engine.zero_stage=3"], ["engine.zero_stage"]),
    (["data.labeled=/nowhere"], ["data.labeled", "/nowhere"]),
    (["model.encoder=mobilenetv3_smal_050"], ["mobilenetv3_small_050"]),
    (["model.pretrained=/nowhere.pth"], ["/nowhere.pth"]),
    (["run.directory=/proc/nowhere"], ["/proc/nowhere"]),
    (["data.labeled=ftp://somewhere/x"], ["ftp"]),
    (["--resume"], ["--resume", "no complete checkpoint"]),
    (["train.labeled_batch=3", "launch.workers=2"], ["train.labeled_batch", "launch.workers of 1"]),
    (["eval.scored_classes=[0,50]"], ["eval.scored_classes", "[50]", "0 to 3"]),
    (["eval.mode=slide", "eval.crop=[16,16]"], ["eval.stride", "exceeds eval.crop"]),
    (["data.lanes=3"], ["data.lanes", "use one of [1, 2, 4]"]),
    (["data.sampling=rare_class", "data.rare_min_pixels=99999999"], ["data.rare_min_pixels", "uniform"]),
    (["--seeds", "0,x"], ["--seeds", "'x'", "0,1,2"]),
])
def test_bad_input_ends_with_code_2_and_the_remedy(config: Path, arguments: list[str], says: list[str]) -> None:
    first = [] if "--recipe" in arguments else ["--config", str(config)]
    extra = [] if {"--resume", "--seeds"} & set(arguments) else ["--dry-run"]
    code, output = command(*first, *extra, *arguments)
    assert code == 2, output
    assert "Traceback" not in output
    for words in says:
        assert words in output, output


@pytest.mark.parametrize("word", ["coding.codebook.length=2", "eval.scored_classes=[50]", "model.encoder=mobilenetv3_smal_050"])
def test_what_settings_tell_is_told_before_data_is_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = command("--recipe", "demo", "--dry-run", word)
    assert code == 2 and word.partition("=")[2].strip("[]") in output
    assert list(tmp_path.iterdir()) == []


def test_printing_the_smoke_variant_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = command("--recipe", "daformer_gta2cityscapes", "--smoke", "--print-config")
    assert code == 0 and "mit_b0.safetensors" in output
    assert list(tmp_path.iterdir()) == []


def test_lost_truncated_and_unlabelled_shards_are_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_plain(data, tmp_path / "runs")))
    shard = data / "target/shard-00000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    code, output = command("--config", str(path), "--dry-run")
    assert code == 2 and "shard-00000.parquet" in output and "bytes" in output
    shard.unlink()
    code, output = command("--config", str(path), "--dry-run")
    assert code == 2 and "is missing" in output
    shard.write_bytes(content)
    code, output = command("--config", str(path), "--dry-run", f"data.labeled={data}/target")
    assert code == 2 and "have no mask" in output
    (data / "val/manifest.json").write_text("{")
    code, output = command("--config", str(path), "--dry-run")
    assert code == 2 and "manifest.json is damaged" in output


LIGHT = """
import sys
import ecocseg.cli, ecocseg.launch
heavy = {"torchvision", "timm", "segmentation_models_pytorch", "deepspeed", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
from ecocseg.libraries import deepspeed, timm
timm.is_model, deepspeed.initialize
helpers = {"wandb", "mlflow"} & set(sys.modules)
assert not helpers, helpers
"""


def test_libraries_that_take_seconds_are_imported_when_used_and_without_what_is_not_used() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_reads_shards_needs_no_torch() -> None:
    """Ray starts such processes beside every worker; torch would be most of the time that they take to begin."""
    read = "import sys; import ecocseg.data.reading, ecocseg.data.shards; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
