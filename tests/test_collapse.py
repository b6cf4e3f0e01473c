"""What is watched in pseudo-labels against plain counts, and when a collapse is told."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import tiny_config

from ecocseg import collapse, loop
from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding, Target
from ecocseg.config import MethodConfig
from ecocseg.data.pipeline import Batch
from ecocseg.engine import World
from ecocseg.evaluate import Normalize
from ecocseg.launch import tracker_factory
from ecocseg.methods import METHODS, StepInput
from ecocseg.teacher import Teacher

N, K = 5, 8


def coding_of(kind: str) -> Any:
    return OneHotCoding(N) if kind == "one_hot" else EcocCoding(max_min(N, K, 0), reliability=0.8)


def pseudo(kind: str, cells: int = 8, side: int = 32) -> Target:
    generator = torch.Generator().manual_seed(1)
    coding = coding_of(kind)
    return coding.pseudo_label(3 * torch.randn(2, coding.num_outputs, cells, cells, generator=generator), size=(side, side))


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_shares_are_those_of_every_fourth_row_and_column(kind: str) -> None:
    target = pseudo(kind)
    target.labels[0, :8] = 255
    confident = target.confidence > 0.8
    metrics = collapse.pseudo_metrics(target, confident, N)
    seen = [int(target.labels[b, y, x]) for b in range(2) for y in range(0, 32, 4) for x in range(0, 32, 4)]
    known = [label for label in seen if label != 255]
    assert len(known) == 2 * 64 - 16
    for n in range(N):
        assert metrics[f"pseudo_share/{n}"].item() == pytest.approx(known.count(n) / len(known))
    assert metrics["pseudo/confident_share"].item() == pytest.approx(confident.double().mean().item())
    assert all(value.dim() == 0 and isinstance(value, torch.Tensor) for value in metrics.values())
    nothing = collapse.class_counts(torch.full((1, 8, 8), 255), N)
    assert nothing.tolist() == [0] * N


def test_bits_differing_and_corrected_are_counted_bit_by_bit() -> None:
    coding, generator = coding_of("ecoc"), torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(1, K, 6, 7, generator=generator, dtype=torch.float64)
    metrics = coding.pseudo_label(logits).metrics
    codes, differing, corrected = coding.codebook.matrix.tolist(), 0, 0
    for y in range(6):
        for x in range(7):
            z = logits[0, :, y, x].tolist()
            label, _, _, reliable = reference.pseudo_label_pixel(z, codes, 0.8, None)
            differ = [int(v >= 0) != bit for v, bit in zip(z, codes[label], strict=True)]
            differing += sum(differ)
            corrected += sum(d and r for d, r in zip(differ, reliable, strict=True))
    assert 0 < corrected < differing
    assert metrics["differing_bits"].item() == pytest.approx(differing / (42 * K), abs=1e-6)
    assert metrics["corrected_bits"].item() == pytest.approx(corrected / (42 * K), abs=1e-6)


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (32, 32)])
def test_disagreement_is_counted_cell_by_cell(kind: str, size: tuple[int, int]) -> None:
    coding, target = coding_of(kind), pseudo(kind)
    target.labels[0, :8], target.is_true[1, 4:20] = 255, True
    logits = torch.randn(2, coding.num_outputs, *size, generator=torch.Generator().manual_seed(3))
    guess = coding.scores(logits).argmax(1)
    wrong, asked = 0, 0
    for b in range(2):
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = i * 32 // size[0] + 32 // size[0] // 2, j * 32 // size[1] + 32 // size[1] // 2
                if target.labels[b, y, x] != 255 and not target.is_true[b, y, x]:
                    asked += 1
                    wrong += int(guess[b, i, j] != target.labels[b, y, x])
    assert 0 < wrong < asked
    assert collapse.disagreement(coding, logits, target).item() == pytest.approx(wrong / asked)


@pytest.mark.parametrize("method", ["self_training", "mic"])
@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_methods_log_them(method: str, kind: str) -> None:
    coding = coding_of(kind)
    student = torch.nn.Conv2d(3, coding.num_outputs, 1)
    image, valid = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.ones(2, 16, 16, dtype=torch.bool)
    labeled = Batch(image, torch.randint(0, N, (2, 16, 16)), valid, torch.arange(2), ["", ""])
    given = StepInput(1, 0, labeled, Batch(image, None, valid, torch.arange(2), ["", ""]), student, Teacher(student, 0.9),
                      nullcontext)
    for part in METHODS[method](MethodConfig(kind=method), coding, Normalize()).parts(given):  # type: ignore[arg-type]
        part()
    wanted = {"pseudo/confident_share", "pseudo/disagreement", *(f"pseudo_share/{n}" for n in range(N))}
    wanted |= {"pseudo/differing_bits", "pseudo/corrected_bits"} if kind == "ecoc" else set()
    assert wanted <= set(given.metrics) and sum(given.metrics[f"pseudo_share/{n}"] for n in range(N)) == pytest.approx(1)


def watch(patience: int = 3, images: int = 100, steps: int = 100) -> collapse.CollapseWatch:
    return collapse.CollapseWatch({"road": 900, "pole": 100, "train": 0}, patience=patience, images_per_record=images,
                                  steps=steps)


def record(pole: float, confident: float = 0.5) -> dict[str, float | None]:
    return {"pseudo_share/road": 1 - pole, "pseudo_share/pole": pole, "pseudo_share/train": 0.0,
            "pseudo/confident_share": confident}


def told(seen: collapse.CollapseWatch, records: list[dict[str, float | None]], first: int = 11) -> list[tuple[int, str]]:
    return [(step, text) for step, one in enumerate(records, first) for text in seen.update(step, one)[1]]


def test_a_class_that_dies_is_named_once() -> None:
    seen = watch()
    found = told(seen, [record(0.05)] * 4 + [record(0.0009)] * 6 + [record(0.05)] + [record(0)] * 6)
    assert len(found) == 1 and found[0][0] == 17 and "class 'pole'" in found[0][1] and "step 17" in found[0][1]
    assert seen.update(40, record(0))[0] == {"collapse/dead": 1.0, "collapse/pole": 1.0}
    assert seen.update(41, record(0.1))[0] == {"collapse/dead": 0.0}
    assert not told(watch(), [record(0.0011)] * 20)  # rare is not dead: a hundredth of its labelled share is the limit
    assert not told(watch(), ([record(0)] * 2 + [record(0.1)]) * 5)  # nor is what comes back in between


def test_confidence_that_dies_is_told() -> None:
    found = told(watch(), [record(0.1, 0.8)] * 3 + [record(0.1, 0.007)] * 5)
    assert [step for step, _ in found] == [16] and "confident" in found[0][1] and "confidence_threshold" in found[0][1]
    assert [step for step, _ in told(watch(), [record(0.1, 0.0)] * 5)] == [13]  # it never lived
    assert not told(watch(), [record(0.1, 0.8)] * 3 + [record(0.1, 0.009)] * 9)


def test_when_nothing_is_told() -> None:
    assert not told(watch(), [record(0)] * 10, first=1)  # the first tenth of a run
    assert not told(watch(patience=0), [record(0, 0)] * 50)
    assert [step for step, _ in told(watch(images=20), [record(0)] * 20)] == [20]  # ten records, for 200 images
    assert watch().update(50, {"target/student/miou": 0.5}) == ({}, [])
    unknown = watch()
    assert not told(unknown, [{**record(0.1), "pseudo_share/pole": None}] * 9)


def test_names_take_the_place_of_ids() -> None:
    scalars = {"pseudo_share/0": 0.25, "pseudo_share/1": 0.75, "lr": 1.0}
    assert collapse.named(scalars, ["road", "door/gate"]) == {"pseudo_share/road": 0.25, "pseudo_share/door gate": 0.75,
                                                              "lr": 1.0}


def test_a_run_warns_and_a_resumed_one_does_not_warn_again(tiny: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that sees one class alone; the run is cut in two in the middle of the records that count."""
    single = collapse.class_counts
    monkeypatch.setattr(collapse, "class_counts",
                        lambda labels, count: single(labels.masked_fill(labels != 255, 0), count))
    monkeypatch.setattr(collapse, "LEAST_IMAGES", 1)

    def run(name: str, stop_at: int | None) -> list[str]:
        config = tiny_config(tiny, tmp_path).updated(
            train={"log_every": 1, "eval_every": 0, "steps": 8}, run={"name": name, "directory": str(tmp_path)},
            tracking={"collapse_after": 4, "tensorboard": False}, data={"loader": "torch"})
        url, texts = str(tmp_path / name), []

        def report(message: dict[str, Any]) -> bool:
            texts.append(message.get("text", ""))
            return stop_at is not None and message.get("step") == stop_at
        try:
            loop.run_worker(config, url, World(), report, tracker_factory(config, url))
        except loop.Stopped:
            pass
        return [text for text in texts if text.startswith("warning")]
    assert run("cut", 3) == []
    told_names = sorted(text.split("'")[1] for text in run("cut", 6) if "class" in text)
    assert told_names == ["block", "sky", "stripe"]  # with the three records of before
    assert run("cut", None) == []
    records = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("collapse/sky")] == [4, 5, 6, 7, 8]
    assert records[0]["pseudo_share/ground"] == 1 and any("val/teacher_student_gap" in r for r in records)
