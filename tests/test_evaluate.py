"""Evaluation against loops over pixels, by hand, and against itself split over workers."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ecocseg import codebook, evaluate, inference
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record, read_manifest, write_shards
from ecocseg.errors import InputError, run_main
from ecocseg.evaluate import EvalSpec, Normalize, predict, predict_scores
from ecocseg.metrics import EvalResult, table
from ecocseg.volumes import volume_names

N, K = 5, 12
IDENTITY = Normalize(mean=(0.0,) * 3, std=(1.0,) * 3)


def ecoc() -> EcocCoding:
    return EcocCoding(codebook.max_min(N, K, seed=0))


def pixel_model(outputs: int, seed: int = 0) -> nn.Module:
    """A model without context: each pixel's logits depend on that pixel alone, so windows cannot change them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, outputs, 1)).eval()


def context_model(outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1)).eval()


def make_samples(sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, str]]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for height, width in sizes:
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, N, (height, width), generator=generator, dtype=torch.uint8)
        labels[torch.rand(height, width, generator=generator) < 0.2] = 255
        samples.append((image, labels, "ab"[len(samples) % 2]))
    return samples


def run(models, coding, samples, spec=None, **options) -> dict[str, EvalResult]:
    options = {"normalize": IDENTITY, "device": "cpu", **options}
    return evaluate.evaluate(models, coding, samples, spec or EvalSpec(), **options)


@pytest.mark.parametrize(
    "length,window,stride", [(1024, 512, 256), (33, 16, 7), (16, 16, 5), (10, 16, 5), (17, 16, 16), (1, 1, 1)]
)
def test_windows_cover_every_pixel_and_stay_inside(length, window, stride):
    starts = evaluate.window_starts(length, window, stride)
    seen = {p for s in starts for p in range(s, min(s + window, length))}
    assert seen == set(range(length))
    assert all(0 <= s <= max(0, length - window) for s in starts)
    assert len(starts) == len(set(starts)) == max(0, -(-(length - window) // stride)) + 1


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (9, 40), (5, 3)])
def test_slide_equals_whole_for_a_model_without_context(size, average):
    coding, model = ecoc(), pixel_model(K)
    image = torch.rand(2, 3, *size)
    whole = predict_scores(model, coding, image, EvalSpec(average=average))
    slide = predict_scores(model, coding, image, EvalSpec(mode="slide", crop=(8, 12), stride=(5, 7), average=average))
    assert whole.shape == (2, N, *size)
    torch.testing.assert_close(slide, whole, rtol=1e-5, atol=1e-5)


def test_slide_averages_overlaps_with_their_counts():
    """A model that answers with its window's mean sees each window apart, so every overlap is checked."""

    class WindowMean(nn.Module):
        def forward(self, image):
            mean = image.mean(dim=(1, 2, 3), keepdim=True).expand(-1, N, *image.shape[-2:])
            return mean * torch.arange(1.0, N + 1).view(-1, 1, 1)

    image = torch.rand(1, 3, 11, 14)
    total, count = torch.zeros(1, N, 11, 14), torch.zeros(11, 14)
    for top in (0, 4, 5):
        for left in (0, 5, 8):
            part = slice(top, top + 6), slice(left, left + 6)
            total[0, :, part[0], part[1]] += WindowMean()(image[..., part[0], part[1]])[0]
            count[part] += 1
    expected = (total / count).softmax(dim=1)
    spec = EvalSpec(mode="slide", crop=(6, 6), stride=(4, 5))
    got = predict(WindowMean(), OneHotCoding(N), image, spec)
    torch.testing.assert_close(got.probabilities, expected)


@pytest.mark.parametrize("mode", [{}, {"mode": "slide", "crop": (12, 12), "stride": (12, 12)}])
def test_flip_makes_predictions_mirror_symmetric(mode):
    coding, model = ecoc(), context_model(K)
    image = torch.rand(1, 3, 20, 24)
    plain = EvalSpec(scales=(0.5, 1.0, 1.5), **mode)
    both = EvalSpec(scales=(0.5, 1.0, 1.5), flip=True, **mode)

    def asymmetry(spec: EvalSpec) -> float:
        mirrored = predict_scores(model, coding, image.flip(-1), spec).flip(-1)
        return float((predict_scores(model, coding, image, spec) - mirrored).abs().max())

    assert asymmetry(both) < 1e-5 < 1e-3 < asymmetry(plain)


def test_scales_are_the_mean_of_single_scale_maps():
    coding, model = ecoc(), context_model(K)
    image = torch.rand(1, 3, 20, 24)
    singles = [predict(model, coding, image, EvalSpec(scales=(s,), average="probabilities")) for s in (0.5, 1.25)]
    several = predict(model, coding, image, EvalSpec(scales=(0.5, 1.25), average="probabilities"))
    mean = (singles[0].probabilities + singles[1].probabilities) / 2
    torch.testing.assert_close(several.probabilities, mean)
    # scores are linear in the probabilities, so averaging scores is the same
    torch.testing.assert_close(several.scores, (singles[0].scores + singles[1].scores) / 2)


@pytest.mark.parametrize("coding,outputs", [(ecoc(), K), (OneHotCoding(N), N)])
def test_logits_and_probabilities_average_differently_and_as_said(coding, outputs):
    model = context_model(outputs)
    image = torch.rand(1, 3, 16, 16) * 20
    views = [model(image), model(image.flip(-1)).flip(-1)]
    views = [nn.functional.interpolate(v, size=(16, 16), mode="bilinear", align_corners=False) for v in views]
    by_logits = predict(model, coding, image, EvalSpec(flip=True))
    by_probabilities = predict(model, coding, image, EvalSpec(flip=True, average="probabilities"))
    mean = (coding.probabilities(views[0]) + coding.probabilities(views[1])) / 2
    torch.testing.assert_close(by_logits.probabilities, coding.probabilities((views[0] + views[1]) / 2))
    torch.testing.assert_close(by_logits.scores, coding.scores((views[0] + views[1]) / 2))
    torch.testing.assert_close(by_probabilities.probabilities, mean)
    torch.testing.assert_close(by_probabilities.scores, coding.scores_from_probabilities(mean))
    assert not torch.allclose(by_logits.probabilities, mean, atol=1e-3)


def test_resize_changes_the_test_size_and_scores_come_back_at_the_labels_size():
    seen = []

    class Spy(nn.Module):
        def forward(self, image):
            seen.append(tuple(image.shape[-2:]))
            return pixel_model(N)(image)

    spec = EvalSpec(resize=(12, 20), scales=(0.5, 1.0))
    scores = predict_scores(Spy(), OneHotCoding(N), torch.rand(1, 3, 24, 40), spec, size=(48, 81))
    assert seen == [(6, 10), (12, 20)]
    assert scores.shape == (1, N, 48, 81)


def test_sides_are_rounded_to_the_multiple_for_a_single_pass_and_for_several():
    seen = []

    class Spy(nn.Module):
        def forward(self, image):
            seen.append(tuple(image.shape[-2:]))
            return pixel_model(N)(image)

    image = torch.rand(1, 3, 24, 33)
    for spec in (EvalSpec(multiple=14), EvalSpec(multiple=14, scales=(1.0, 0.1))):
        assert predict_scores(Spy(), OneHotCoding(N), image, spec).shape == (1, N, 24, 33)
    evaluate.predict_logits(Spy(), OneHotCoding(N), image, EvalSpec(multiple=14))
    assert seen == [(28, 28), (28, 28), (14, 14), (28, 28)]


@pytest.mark.parametrize("coding,outputs", [(ecoc(), K), (OneHotCoding(N), N)])
def test_split_over_workers_sums_to_exactly_the_same(coding, outputs):
    samples = make_samples([(9, 12), (8, 8), (15, 7), (9, 12), (4, 6)])
    models = {"student": context_model(outputs), "teacher": context_model(outputs, seed=1)}
    spec = EvalSpec(mode="slide", crop=(8, 8), stride=(4, 4), scored_classes=(0, 2))
    alone = run(models, coding, samples, spec, volumes="ab")
    packed: list[Tensor] = []

    def keep(counts: Tensor) -> Tensor:
        assert counts.dtype == torch.int64
        packed.append(counts)
        return counts

    for rank in range(3):
        run(models, coding, samples[rank::3], spec, reduce=keep, volumes="ab")
    assert len(packed) == 3  # one call per worker, whatever the number of models
    together = run(models, coding, [], spec, reduce=lambda zero: zero + sum(packed), volumes="ab")
    for name in models:
        assert torch.equal(together[name].confusion, alone[name].confusion)
        assert torch.equal(together[name].calibration, alone[name].calibration)
        assert torch.equal(together[name].volumes, alone[name].volumes) and together[name].score == alone[name].score
        assert together[name].miou == alone[name].miou
        assert together[name].scored_classes == (0, 2)
    assert int(alone["student"].confusion.sum()) == sum(int((labels != 255).sum()) for _, labels, _ in samples)
    assert not torch.equal(alone["student"].confusion, alone["teacher"].confusion)


def test_dice_of_volumes_by_sets_of_pixels():
    coding, model = OneHotCoding(N), pixel_model(N)
    samples = make_samples([(9, 12), (8, 8), (15, 7), (4, 6)])
    result = run({"m": model}, coding, samples, EvalSpec(scored_classes=(1, 2, 4)), volumes=["b", "c", "a"])["m"]
    expected = []
    for n in range(N):
        each = []
        for volume in "ab":
            truth, found = set(), set()
            for i, (image, labels, of) in enumerate(samples):
                pred = predict_scores(model, coding, IDENTITY(image)[None], EvalSpec())[0].argmax(0)
                for y, x in (labels != 255).nonzero().tolist():
                    if of == volume:
                        truth |= {(i, y, x)} if labels[y, x] == n else set()
                        found |= {(i, y, x)} if pred[y, x] == n else set()
            each.append(2 * len(truth & found) / (len(truth) + len(found)))
        expected.append(sum(each) / 2)  # "c" has no slices, so no Dice
    assert result.dice.tolist() == pytest.approx(expected, abs=1e-12)
    assert result.score == result.figures()["dice"] == pytest.approx(sum(expected[n] for n in (1, 2, 4)) / 3)
    assert result.score != result.miou
    back = EvalResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert (back.score, back.miou) == (result.score, result.miou)
    lines = table({"m": result}, [*"vwxyz"]).splitlines()
    assert lines[0].split() == ["Dice,", "%", "m"] and f"mean 3-D Dice{100 * result.score:14.1f}" in lines


def test_dice_needs_volumes(tmp_path):
    picture, mask = png(np.zeros((4, 4, 3), np.uint8)), png(np.zeros((4, 4), np.uint8))
    for name, groups in (("with", "ba"), ("without", "a ")):
        records = [Record(f"{i}", picture, mask, group=group.strip() or None) for i, group in enumerate(groups)]
        write_shards(records, str(tmp_path / name), dataset="toy", classes=CLASS_LISTS["voc"])
    assert volume_names(read_manifest(str(tmp_path / "with"))) == ["a", "b"]
    with pytest.raises(InputError, match=r"eval.metric: dice is counted by volume, but .*without has images without a group"):
        volume_names(read_manifest(str(tmp_path / "without")))


def test_a_perfect_model_scores_one_and_gets_its_modes_back():
    coding = OneHotCoding(N)

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.free = nn.BatchNorm2d(3), nn.Dropout(0.9)

        def forward(self, image):
            assert not self.training
            return nn.functional.one_hot((image[:, 0] * 255).round().long(), N).permute(0, 3, 1, 2).float() * 9

    model = Oracle().train()
    model.frozen.eval()
    samples = [(labels.clamp(max=N - 1).expand(3, -1, -1), labels, None) for _, labels, _ in make_samples([(6, 7), (5, 5)])]
    result = run({"student": model}, coding, samples)["student"]
    assert result.miou == result.accuracy == 1.0
    assert model.training and model.free.training and not model.frozen.training


def test_decoding_stays_in_float32_under_autocast():
    coding, model = ecoc(), pixel_model(K)
    image = torch.rand(1, 3, 8, 8)
    low = predict(model, coding, image, EvalSpec(), autocast=torch.bfloat16)
    assert low.scores.dtype == low.probabilities.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image).float()
    torch.testing.assert_close(low.scores, coding.scores(logits))


def test_result_survives_json_and_the_table_shows_the_change():
    samples = make_samples([(9, 12)])
    models = {"before": pixel_model(K), "after": pixel_model(K, seed=1)}
    results = run(models, ecoc(), samples, EvalSpec(scored_classes=(0, 1, 2)))
    back = EvalResult.from_dict(json.loads(json.dumps(results["before"].to_dict(), allow_nan=False)))
    assert torch.equal(back.confusion, results["before"].confusion)
    assert (back.miou, back.ece, back.scored_classes) == (results["before"].miou, results["before"].ece, (0, 1, 2))
    names = ["road", "sidewalk", "sky", "traffic light", "person"]
    lines = table(results, names).splitlines()
    assert lines[0].split() == ["IoU,", "%", "before", "after", "change"]
    assert any(line.startswith("(traffic light)") for line in lines)
    miou = next(line.split() for line in lines if line.startswith("mIoU"))
    before, after = results["before"].miou * 100, results["after"].miou * 100
    assert miou == ["mIoU", f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]
    assert len({len(line) for line in lines}) == 1
    absent = EvalResult(torch.diag(torch.tensor([3, 0])), torch.zeros(15, 3, dtype=torch.int64))
    json.dumps(absent.to_dict(), allow_nan=False)
    assert table({"x": absent}, ["a", "b"]).splitlines()[3].split() == ["b", "-"]


@pytest.mark.parametrize(
    "bad,words",
    [
        ({"mode": "tiles"}, "eval.mode 'tiles'"),
        ({"mode": "slide"}, "needs eval.crop and eval.stride"),
        ({"mode": "slide", "crop": (4, 4), "stride": (8, 8)}, "eval.stride .* exceeds eval.crop"),
        ({"scales": ()}, "eval.scales"),
        ({"average": "votes"}, "eval.average 'votes'"),
        ({"resize": (0, 5)}, "eval.resize"),
    ],
)
def test_a_bad_spec_names_the_key(bad, words):
    with pytest.raises(InputError, match=words):
        EvalSpec(**bad)


def test_normalize_takes_bytes_and_floats_and_goes_back():
    normalize = Normalize()
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    by_hand = (image[1, 2, 3, 4].item() / 255 - 0.406) / 0.225
    assert float(normalize(image)[1, 2, 3, 4]) == pytest.approx(by_hand, abs=1e-5)
    torch.testing.assert_close(normalize(image), normalize(image.float() / 255))
    assert torch.equal(normalize.inverse(normalize(image)), image)
    assert torch.equal(normalize(image[0]), normalize(image)[0])


NAMES = ("road", "building", "sky", "tree", "person")
COLOURS = ((128, 64, 128), (70, 70, 70), (70, 130, 180), (107, 142, 35), (220, 20, 60))


def job(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "jobs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"job_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(monkeypatch):
    """What loading a checkpoint would give, for jobs that are handed the name of one."""
    from ecocseg.config import RunConfig
    from ecocseg.data.classes import ClassList

    loaded = SimpleNamespace(
        model=context_model(K), coding=ecoc(), class_list=ClassList("toy", NAMES, COLOURS), normalize=Normalize(),
        step=7, spec=EvalSpec(), config=RunConfig())  # fmt: skip

    def load(path, which, storage, device):
        if which == "teacher":
            raise InputError("no teacher")
        return loaded

    monkeypatch.setattr(inference, "load", load)
    return loaded


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def test_predict_writes_masks_and_overlays_and_names_unreadable_files(tmp_path, checkpoint, capsys):
    rng = np.random.default_rng(0)
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "sub").mkdir(parents=True)
    pictures = {"a.png": (9, 14, 3), "a.bmp": (8, 8, 3), "sub/grey.png": (10, 12), "sub/alpha.png": (7, 9, 4)}
    for name, shape in pictures.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(images / name)
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:90])
    (images / "notes.txt").write_text("no image at all")
    predict_job = job("predict")
    assert run_main(lambda: predict_job.main(["run", str(images), "--out", str(out), "--device", "cpu"])) == 2
    error = capsys.readouterr().err
    assert "2 of 6" in error and "broken.jpg" in error and "cut.png" in error and "a.bmp" not in error
    masks = sorted(p.relative_to(out / "masks").as_posix() for p in (out / "masks").rglob("*") if p.is_file())
    assert masks == ["a.bmp.png", "a.png.png", "sub/alpha.png", "sub/grey.png"]
    for name, written in {"a.png": "a.png", "sub/grey.png": "sub/grey"}.items():
        rgb = torch.from_numpy(np.array(Image.open(images / name).convert("RGB"))).permute(2, 0, 1)
        scores = predict_scores(checkpoint.model, checkpoint.coding, checkpoint.normalize(rgb).unsqueeze(0), EvalSpec())
        mask = Image.open(out / "masks" / f"{written}.png")
        assert mask.mode == "P" and mask.getpalette()[:15] == [v for colour in COLOURS for v in colour]
        assert np.array_equal(np.asarray(mask), scores.argmax(dim=1)[0].numpy())
        assert Image.open(out / "overlays" / f"{written}.jpg").size == mask.size
    assert [entry["name"] for entry in json.loads((out / "classes.json").read_text())] == list(NAMES)


def test_predict_of_two_dates(tmp_path, checkpoint, capsys):
    from ecocseg.config import RunConfig

    class Difference(nn.Module):
        def forward(self, pair):
            first, second = pair.chunk(2, dim=1)
            changed = ((first - second).abs().sum(1, keepdim=True) > 0.1).float()
            signs = torch.tensor(checkpoint.coding.codebook.matrix).float() * 2 - 1
            return 9 * torch.where(changed > 0, signs[1].view(1, K, 1, 1), signs[0].view(1, K, 1, 1))

    checkpoint.model = Difference()
    checkpoint.config = RunConfig().updated(model={"siamese": True})
    before = np.random.default_rng(0).integers(0, 200, (8, 9, 3), dtype=np.uint8)
    after = before.copy()
    after[2:5, 3:7] += 50
    for date, picture in (("old", before), ("new", after)):
        (tmp_path / date / "tiles").mkdir(parents=True)
        (tmp_path / date / "tiles/a.png").write_bytes(png(picture))
        (tmp_path / date / "tiles/b.png").write_bytes(png(picture if date == "old" else picture[:5]))
    run, out = job("predict").main, tmp_path / "out"
    arguments = ["run", str(tmp_path / "old"), "--out", str(out), "--device", "cpu"]
    assert run_main(lambda: run([*arguments, "--second", str(tmp_path / "new")])) == 2
    assert "b.png: the dates are 9x8 and 9x5 (width x height)" in capsys.readouterr().err
    expected = np.zeros((8, 9), np.uint8)
    expected[2:5, 3:7] = 1
    assert np.array_equal(np.asarray(Image.open(out / "masks/tiles/a.png")), expected)
    assert run_main(lambda: run(arguments)) == 2 and "give the second one with --second" in capsys.readouterr().err
    checkpoint.config = RunConfig()
    assert run_main(lambda: run([*arguments, "--second", "x"])) == 2 and "leave it out" in capsys.readouterr().err


def test_predict_of_one_image_and_bad_arguments(tmp_path, checkpoint, capsys):
    image = tmp_path / "one.png"
    image.write_bytes(png(np.zeros((6, 6, 3), dtype=np.uint8)))
    predict_job = job("predict")
    assert predict_job.main(["run", str(image), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "masks" / "one.png").exists()
    for arguments, words in {
        ("run", str(tmp_path / "none"), "--out", str(tmp_path / "o")): "does not exist",
        ("run", str(image), "--out", str(image)): "cannot be written",
        ("run", str(image), "--out", str(tmp_path / "o"), "--mode", "slide"): "eval.crop",
        ("run", str(image), "--out", str(tmp_path / "o"), "--device", "abacus"): "--device abacus",
    }.items():
        assert run_main(lambda a=arguments: predict_job.main(list(a))) == 2
        assert words in capsys.readouterr().err


def test_evaluate_command_gives_the_numbers_of_evaluate(tmp_path, checkpoint, capsys):
    from ecocseg.data.classes import ClassList
    from ecocseg.data.shards import Record, write_shards

    samples = make_samples([(9, 12), (8, 8), (15, 7)])
    encoded = [(png(image.permute(1, 2, 0).numpy()), png(labels.numpy())) for image, labels, _ in samples]
    records = [Record(f"image{i}", image, mask) for i, (image, mask) in enumerate(encoded)]
    write_shards(records, str(tmp_path / "data"), dataset="toy", classes=checkpoint.class_list)
    spec = EvalSpec(mode="slide", crop=(8, 8), stride=(4, 4), flip=True)
    flags = ["--mode", "slide", "--crop", "8", "8", "--stride", "4", "4", "--flip", "--device", "cpu"]
    evaluate_job = job("evaluate")
    data, written = str(tmp_path / "data"), tmp_path / "result.json"
    assert evaluate_job.main(["run", "--data", data, "--json", str(written), *flags]) == 0
    expected = run({"student": checkpoint.model}, checkpoint.coding, samples, spec, normalize=checkpoint.normalize)
    report = json.loads(written.read_text())
    assert report["results"]["student"] == expected["student"].to_dict()
    assert (report["step"], report["images"], list(report["results"])) == (7, 3, ["student"])
    assert table(expected, NAMES) in capsys.readouterr().out
    checkpoint.class_list = ClassList("other", (*NAMES[:-1], "rider"), COLOURS)
    assert run_main(lambda: evaluate_job.main(["run", "--data", data, *flags])) == 2
    assert "classes of 'toy' (5)" in capsys.readouterr().err
