"""A whole run on one GPU, as a user starts it. Not in CI: `pytest -m gpu` where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_plain

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("changes", [
    {"engine__kind": "deepspeed", "engine__zero_stage": 2}, {"engine__kind": "torch", "engine__compile": True},
    {"engine__kind": "torch", "engine__channels_last": True, "data__loader": "ray"}])
def test_a_run_in_bf16_on_one_gpu_stops_and_goes_on(tiny: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_plain(tiny, tmp_path / "runs", engine__precision="bf16", **changes)))
    command = [sys.executable, str(ROOT / "jobs/train_uda.py"), "--config", str(config)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 GPU" in done.stdout + done.stderr, done.stdout + done.stderr
    run = tmp_path / "runs/run"
    assert json.loads((run / "result.json").read_text())["step"] == 10
    for path in (run / "checkpoints/step_00000010").iterdir():  # as if killed after step 5
        path.unlink()
    (run / "result.json").unlink()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "going on from step 5" in done.stdout + done.stderr, done.stdout + done.stderr
