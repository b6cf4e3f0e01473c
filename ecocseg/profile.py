"""Where a step goes: `train.profile=N` records N steps and writes a trace and a table into the run's folder.

The parts of a step are ranges with names, whatever is inside them; outside of a profile a range costs next to nothing.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ecocseg.config import PROFILE_WARM_UP
from ecocseg.storage import Storage, join

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "table.txt"
DATA, STUDENT, TEACHER, CODING, BACKWARD, OPTIMIZER, EMA = (
    "data wait", "student forward", "teacher forward", "coding maths", "backward", "optimiser", "EMA")
STEP = "step"
RANGES = (DATA, STUDENT, TEACHER, CODING, BACKWARD, OPTIMIZER, EMA)


def within(name: str) -> Any:
    """A context whose time a profile shows under one of the names above."""
    return record_function(name)


class StepProfile:
    """Starts after the warm-up steps of this process, ends after `steps` more, and writes what it saw.

    Only rank 0 records. What it records slows it down, and with it, at the next sum of gradients, every other worker.
    """

    def __init__(self, steps: int, device: torch.device, run_url: str, storage: Storage) -> None:
        self.steps, self.device, self.run_url, self.storage = steps, device, run_url, storage
        self._seen = 0
        self._profile: profile | None = None

    def step(self) -> str | None:
        """To be called before each step, and after the last one. Returns a message once the profile is written."""
        message = None
        if self._profile is not None and self._seen == PROFILE_WARM_UP + self.steps:
            message = self.finish()
        elif self._seen == PROFILE_WARM_UP and self.steps > 0:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
            self._profile = profile(activities=activities)
            self._profile.start()
        self._seen += 1
        return message

    def finish(self) -> str | None:
        """End the profile, be it of fewer steps than wanted, and write it; None where there is none."""
        if self._profile is None:
            return None
        seen, self._profile = self._profile, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seen.stop()
        table = step_table(seen.key_averages(), self.device)
        folder = join(self.run_url, FOLDER)
        with tempfile.TemporaryDirectory() as scratch:
            plain, packed = Path(scratch, "trace.json"), Path(scratch, TRACE)
            seen.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target)
            self.storage.write_bytes(join(folder, TRACE), packed.read_bytes())
        self.storage.write_bytes(join(folder, TABLE), table.encode())
        parts, _, _ = table.partition("\n\n")
        return f"profile written to {folder} ({TRACE} for chrome://tracing or Perfetto, {TABLE}):\n{parts}"


def step_table(averages: Any, device: torch.device) -> str:
    """Milliseconds a step of each range, its share, and below that torch's own table of operations."""
    host: dict[str, float] = defaultdict(float)  # microseconds; a range's work on a GPU is an event of its own
    gpu: dict[str, float] = defaultdict(float)
    steps, on_gpu = 1, device.type == "cuda"
    for event in averages:
        if event.key in (*RANGES, STEP):
            host[event.key] += event.cpu_time_total
            gpu[event.key] = max(gpu[event.key], event.device_time_total)
            steps = max(steps, event.count) if event.key == STEP else steps
    total = host[STEP] / 1000 / steps
    lines = [f"{'where a step goes':<18}{'ms':>10}{'share':>9}" + (f"{'GPU ms':>10}" if on_gpu else "")]
    known = 0.0
    for name in RANGES:
        ms = host[name] / 1000 / steps
        known += ms
        behind = f"{gpu[name] / 1000 / steps:>10.2f}" if on_gpu else ""
        lines.append(f"{name:<18}{ms:>10.2f}{100 * ms / max(total, 1e-9):>7.1f} %{behind}")
    lines.append(f"{'other':<18}{total - known:>10.2f}{100 * (total - known) / max(total, 1e-9):>7.1f} %")
    lines.append(f"{'all':<18}{total:>10.2f}  of {steps} step(s)"
                 + (", host time; a GPU works on behind it" if on_gpu else ""))
    sort = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=sort, row_limit=40)
