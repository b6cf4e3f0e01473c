"""Curves without duplicates after a resume, one readable line at a time, and pictures of the right shape."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecocseg import codebook, panels
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.tracking import ProgressDisplay, Tracker, read_metrics

PALETTE = ((128, 64, 128), (70, 70, 70), (107, 142, 35))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps_and_losses(directory) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(directory)]


def test_metrics_of_a_killed_and_resumed_run_have_each_step_once(tmp_path):
    first = Tracker(tmp_path, 10)
    for step in range(7):
        first.log(step, {"loss": step + 0.5})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # cut off by the kill
    second = Tracker(tmp_path, 10, start_step=4)
    assert steps_and_losses(tmp_path) == [(s, s + 0.5) for s in range(4)]
    for step in range(4, 10):
        second.log(step, {"loss": step + 100.0})
    second.close()
    expected = [(s, s + 0.5) for s in range(4)] + [(s, s + 100.0) for s in range(4, 10)]
    assert steps_and_losses(tmp_path) == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    for loss in (1.0, 2.0):
        tracker = Tracker(tmp_path, 10, tensorboard=False)
        tracker.log(0, {"loss": loss})
        tracker.close()
        tracker.close()
    assert steps_and_losses(tmp_path) == [(0, 2.0)]
    assert not (tmp_path / "tensorboard").exists()


def test_not_a_number_is_null_in_the_file(tmp_path):
    tracker = Tracker(tmp_path, 10, tensorboard=False)
    tracker.log(3, {"loss": float("nan"), "grad": float("inf"), "miou": 0.5})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": None, "grad": None, "miou": 0.5}


def test_console_gets_pace_and_time_left(tmp_path):
    clock, seen = Clock(), []
    tracker = Tracker(tmp_path, 100, start_step=20, console=seen.append, tensorboard=False, clock=clock)
    clock.now = 5.0
    tracker.log(30, {"loss": 1.0})
    tracker.log(30, {"miou": 0.25})  # the same step again: the pace stays
    tracker.close()
    assert seen[0] == {"step": 30, "total": 100, "rate": 2.0, "eta": 35.0, "loss": 1.0}
    assert seen[1] == {"step": 30, "total": 100, "rate": 2.0, "eta": 35.0, "miou": 0.25}


def test_image_is_a_png_and_in_tensorboard(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    tracker = Tracker(tmp_path, 10)
    path = tracker.image(5, "target/mixed", picture)
    tracker.close()
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["images"] == ["target/mixed"]


def display(**options) -> tuple[ProgressDisplay, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return ProgressDisplay(stream=stream, clock=clock, **options), stream, clock


def test_plain_lines_are_throttled_but_evaluations_never_are():
    shown, stream, clock = display()
    lines = []
    for step in range(0, 1001):
        clock.now = step * 0.5
        record = {"step": step, "total": 1000, "loss": 1.0}
        if step == 555:
            record["teacher/miou"] = 0.4321
        before = stream.getvalue().count("\n")
        shown.update(record)
        if stream.getvalue().count("\n") > before:
            lines.append(step)
    shown.close()
    # every 20 steps are 10 s; the evaluation at 555 starts the count again; the end is shown too
    assert lines == [*range(0, 541, 20), 555, *range(575, 1000, 20), 1000]
    assert "mIoU teacher 43.2" in stream.getvalue()


def test_fast_runs_print_each_tenth():
    shown, stream, _ = display()
    for step in range(101):
        shown.update({"step": step, "total": 100})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [f"{s}/100" for s in range(0, 101, 10)]


def test_a_line_says_everything_in_plain_words():
    shown, stream, _ = display()
    shown.update({
        "phase": "self-training", "step": 150, "total": 600, "rate": 3.0, "eta": 3725.0, "loss/mixed": 0.25,
        "loss": 1.25,
        "pseudo/confident_share": 0.43, "pseudo/corrected_bits": 0.021, "data_wait_share": 0.005, "miou/student": 0.5,
        "optim/lr": 0.1,
    })  # fmt: skip
    assert stream.getvalue() == (
        "self-training  step 150/600 (25 %)  3.00 steps/s  eta 1:02:05  loss 1.250  mixed 0.250  confident 43.0 %  "
        "bits corrected 2.1 %  waiting for data 0.5 %  mIoU student 50.0\n"
    )
    shown.update({"phase": "evaluating"})
    assert stream.getvalue().splitlines()[1].startswith("evaluating  step 150/600")
    shown.print_table("a  b\n[1] 2", title="IoU")
    assert "\nIoU\na  b\n[1] 2\n" in stream.getvalue()


def test_live_panel_keeps_evaluations_and_ends_with_a_plain_line():
    shown, stream, _ = display(live=True)
    with shown:
        shown.update({"step": 1, "total": 4, "loss": 2.0})
        shown.update({"step": 2, "total": 4, "miou": 0.3})
        shown.print("saved")
    text = stream.getvalue()
    assert "step 1/4" in text and "saved" in text
    assert text.rstrip().endswith("step 2/4 (50 %)  loss 2.000  mIoU 30.0")


def test_colourise_and_overlay():
    labels = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    colours = panels.colourise(labels, PALETTE)
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[[128, 64, 128], [70, 70, 70]], [[107, 142, 35], [0, 0, 0]]]
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    mixed = panels.overlay(image, labels, PALETTE, alpha=0.5)
    assert mixed[0, 0].tolist() == [114, 82, 114]
    assert mixed[1, 1].tolist() == [100, 100, 100]  # ignored pixels show the image


def test_panel_shapes_and_missing_columns():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    labels = torch.randint(0, 3, (40, 60))
    share = torch.rand(40, 60)
    full = panels.panel(
        image, PALETTE, labels=labels, pseudo_labels=labels, confidence=share, reliable=share, prediction=labels
    )
    some = panels.panel(image, PALETTE, prediction=labels)
    assert full.dtype == np.uint8 and full.shape[2] == 3
    assert full.shape[0] == some.shape[0]
    cell = (some.shape[1] - 3 * panels.GAP) // 2
    assert full.shape[1] == 6 * cell + 7 * panels.GAP
    strip = panels.legend(["road", "building", "tree"], PALETTE, width=full.shape[1])
    assert strip.shape[1] == full.shape[1]
    for colour in PALETTE:
        assert (strip == colour).all(axis=2).any()
    sheet = panels.stack([full, some, strip])
    assert sheet.shape == (full.shape[0] + some.shape[0] + strip.shape[0], full.shape[1], 3)


@pytest.mark.parametrize("coding", [OneHotCoding(3), EcocCoding(codebook.max_min(3, 3, seed=0))])
def test_training_picture_draws_what_the_method_left(coding):
    classes = SimpleNamespace(names=("road", "building", "tree"), palette=PALETTE)
    image = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    labels = torch.randint(0, 3, (3, 16, 24))
    logits = torch.randn(3, coding.num_outputs, 4, 6)
    supervised = {"labeled_image": image, "labeled_labels": labels, "labeled_logits": logits}
    pseudo = coding.pseudo_label(logits, size=(16, 24))
    adapted = supervised | {"unlabeled_image": image, "pseudo": pseudo, "mixed_image": image / 255.0,
                            "mixed_labels": labels, "mixed_logits": logits}  # fmt: skip
    row = panels.panel(image[0], PALETTE, prediction=labels[0]).shape[0]
    small, large = (panels.training_picture(pictures, coding, classes, rows=2) for pictures in (supervised, adapted))
    legend_height = small.shape[0] - 2 * row
    assert 0 < legend_height < row
    assert large.shape[0] == 6 * row + legend_height
    cells = 4 if isinstance(coding, EcocCoding) else 3  # one-hot has no reliable bits
    assert large.shape[1] == cells * panels.CELL_WIDTHS[0] + (cells + 1) * panels.GAP


def test_messages_and_checkpoints_are_printed_as_they_come():
    shown, stream, _ = display()
    shown.update({"kind": "message", "text": "training from step 0 [2 workers]"})
    shown.update({"kind": "checkpoint", "step": 5, "url": "runs/x/checkpoints/step_5"})
    shown.update({"kind": "final", "step": 5, "results": {}})
    assert stream.getvalue() == "training from step 0 [2 workers]\nsaved runs/x/checkpoints/step_5\n"


def test_heat_is_brighter_where_the_value_is_larger():
    heat = panels.heat_map(torch.tensor([[0.5, 0.6, 0.75, 0.9, 1.0]]), 0.5, 1.0).astype(int)
    assert (np.diff(heat.sum(axis=2)[0]) > 0).all()
    assert np.array_equal(panels.heat_map(torch.tensor([[0.2, 1.4]]), 0.5, 1.0)[0], heat[0, [0, 4]])
