"""A pool labelled by a checkpoint: what the coding says of each image, every image once whatever ends the job, from and to
a bucket; rounds by stability; and training from such shards."""

from __future__ import annotations

import dataclasses
import functools
import http.client
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import CLASSES, damage_rows, scene, tiny_config
from moto.server import ThreadedMotoServer
from PIL import Image

from ecocseg import bits, checkpoint, labelling
from ecocseg.data import mixing, pseudo
from ecocseg.data.pipeline import Stream
from ecocseg.data.pseudo import OPTION, decode_bits
from ecocseg.data.shards import Record, iter_rows, read_manifest, read_metadata, write_shards
from ecocseg.data.sources.demo import encode_png
from ecocseg.data.transforms import WeakTransform
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.evaluate import Normalize, image_tensor
from ecocseg.inference import load
from ecocseg.labelling_shard import agreement, by_size
from ecocseg.launch import preflight
from ecocseg.loop import run_worker
from ecocseg.methods import StepInput, Supervised
from ecocseg.storage import Storage

SCRIPT = Path(__file__).resolve().parents[1] / "jobs" / "pseudo_label.py"
IMAGES, THRESHOLD, GAIN = 26, 0.7, 1.5
COLUMNS = ("image_id", "image", "mask", "bits", "weight", "stability", "group", "index", "height", "width")


@pytest.fixture(scope="module")
def job():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("pseudo_label", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


def records():
    """Scenes of two sizes, by turns."""
    for number in range(IMAGES):
        image, _ = scene(number, 40)
        if number % 3 == 0:
            pixels = image_tensor(image, "").permute(1, 2, 0).numpy()
            image = encode_png(np.ascontiguousarray(pixels[:40, :56]))
        yield Record(f"image-{number}", image, group=f"group-{number // 5}", index=number)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("pool"))
    manifest = write_shards(records(), url, dataset="tiny/pool", classes=CLASSES, row_group_rows=2, shard_bytes=30_000)
    assert len(manifest.files) >= 4
    return manifest


def make_run(tiny, root, kind, storage=None):
    """A run with checkpoints of steps 1 and 2: untrained, the second sure of much and a little off the first."""
    config = tiny_config(tiny, root, coding__kind=kind)
    storage = storage or Storage()
    book = checkpoint.build_codebook(config.coding, CLASSES)
    outputs = CLASSES.num_classes if book is None else book.matrix.shape[1]
    for step in (1, 2):
        torch.manual_seed(1)
        model = checkpoint.build_model(config.model, outputs, pretrained=False)
        spread(model.eval(), outputs, step)
        meta = {"teacher_updates": 0, "best": {}, "config": config.model_dump(mode="json"),
                **checkpoint.describe_task(book, CLASSES)}
        snapshot = checkpoint.Snapshot(step, checkpoint.cpu_state(model), None, {}, meta)
        checkpoint.Checkpoints(str(root), storage).save(snapshot)
    return str(root)


@torch.no_grad()
def spread(model, outputs, step):
    """Give the last layer outputs around 0 that are sure in places; those of step 2 differ a little from those of step 1."""
    images = torch.stack([image_tensor(scene(n, 40)[0], "") for n in range(8)])
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d) and module.out_channels == outputs][-1]
    last.weight.add_(0.15 * (step - 1) * last.weight.std() * torch.randn_like(last.weight))
    logits = model(Normalize()(images))
    mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
    last.weight.mul_((GAIN / std).view(-1, 1, 1, 1))
    last.bias.sub_(mean).mul_(GAIN / std)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, labelling_by_one_thread):
    return {kind: make_run(tiny, tmp_path_factory.mktemp(kind), kind) for kind in ("one_hot", "ecoc")}


@pytest.fixture(scope="module")
def labelled(job, runs, pool, tmp_path_factory):
    """The pool labelled by step 2 of each run, compared with step 1, in this process."""
    made = {}
    for kind, run in runs.items():
        out = str(tmp_path_factory.mktemp(f"labelled-{kind}") / "all")
        assert job.main([run, pool.url, "--out", out, "--checkpoints", f"{run}/checkpoints/step_00000001", "--threshold",
                         str(THRESHOLD), "--workers", "1", "--device", "cpu", "--keep", "0.5"]) == 0
        made[kind] = read_manifest(out)
    return made


@functools.cache
def loaded_from(url):
    return load(url, "auto", Storage(), torch.device("cpu"))


def expected(run, image_3HW, which="step_00000002"):
    loaded = loaded_from(f"{run}/checkpoints/{which}")
    with torch.no_grad():
        logits = loaded.model(loaded.normalize(image_3HW[None]))
    return loaded.coding, loaded.coding.pseudo_label(logits, image_3HW.shape[-2:])


def iou_by_hand(a, b):
    classes = np.union1d(a, b)
    return np.mean([((a == c) & (b == c)).sum() / ((a == c) | (b == c)).sum() for c in classes])


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_labels_are_those_of_the_coding_and_rows_those_of_the_pool(kind, runs, pool, labelled):
    manifest = labelled[kind]
    assert [f.rows for f in manifest.files] == [f.rows for f in pool.files]
    assert manifest.num_labeled == manifest.num_rows == IMAGES and manifest.classes == CLASSES
    plain = ("image_id", "image", "group", "index", "height", "width")
    before, rows = list(iter_rows(pool, columns=plain)), list(iter_rows(manifest, columns=COLUMNS))
    assert [{name: row[name] for name in plain} for row in rows] == before
    stabilities, weights, changed = set(), set(), 0
    for row in rows:
        image_3HW = image_tensor(row["image"], "")
        coding, target = expected(runs[kind], image_3HW)
        _, earlier = expected(runs[kind], image_3HW, "step_00000001")
        labels_1HW = torch.from_numpy(np.array(Image.open(io.BytesIO(row["mask"])))).long()[None]
        assert torch.equal(labels_1HW, target.labels)
        assert row["weight"] == pytest.approx(float((target.confidence >= THRESHOLD).double().mean()), abs=1e-7)
        assert row["stability"] == pytest.approx(iou_by_hand(earlier.labels.numpy(), target.labels.numpy()), abs=1e-6)
        weights.add(row["weight"])
        stabilities.add(row["stability"])
        if kind == "one_hot":
            assert row["bits"] is None
            continue
        planes = torch.from_numpy(decode_bits(row["bits"], (1, *image_3HW.shape[1:])).copy())
        stored = coding.stored(labels_1HW, planes[None], torch.tensor([row["weight"]]))
        assert torch.equal(stored.bits, target.bits) and not stored.is_true.any()
        assert torch.equal(stored.weight, torch.full_like(stored.weight, row["weight"]))
        changed += int(planes.count_nonzero())
    assert len(weights) > 3 and len(stabilities) > 3 and (kind == "one_hot" or changed > 0)
    told = manifest.options[OPTION]
    assert (told["coding"], told["step"], told["stability_steps"], told["confidence_threshold"]) == (kind, 2, [1], THRESHOLD)
    assert (told["codebook"] is None) == (kind == "one_hot")


def test_the_manifest_counts_the_pixels_of_its_masks(labelled):
    for manifest in labelled.values():
        column = read_metadata(manifest, ["class_pixels"]).column("class_pixels").to_pylist()
        assert np.sum(column, axis=0).tolist() == list(manifest.class_pixels) and sum(manifest.class_pixels) > 0


def test_the_most_stable_half_first_and_a_second_round_for_the_rest(job, runs, labelled, capsys):
    manifest = labelled["ecoc"]
    rows = list(iter_rows(manifest, columns=("image_id", "stability")))
    best = {row["image_id"] for row in sorted(rows, key=lambda row: -row["stability"])[:IMAGES // 2]}
    parts = {name: read_manifest(f"{manifest.url}/{name}") for name in ("stable", "rest")}
    ids = {name: [row["image_id"] for row in iter_rows(part)] for name, part in parts.items()}
    assert set(ids["stable"]) == best and ids["stable"] + ids["rest"] != [] and len(ids["stable"]) == IMAGES // 2
    assert sorted(ids["stable"] + ids["rest"]) == sorted(row["image_id"] for row in rows)
    whole = {row["image_id"]: row for row in iter_rows(manifest, columns=COLUMNS)}
    assert all(row == whole[row["image_id"]] for row in iter_rows(parts["stable"], columns=COLUMNS))
    out = f"{manifest.url}/second"
    arguments = [runs["ecoc"], parts["rest"].url, "--with", parts["stable"].url, "--out", out, "--workers", "1",
                 "--device", "cpu"]
    assert job.main([*arguments, "--dry-run"]) == 0 and "nothing was labelled" in capsys.readouterr().out
    assert not Path(out, "manifest.json").exists()
    assert job.main(arguments) == 0
    second = read_manifest(out)
    assert [row["image_id"] for row in iter_rows(second)] == ids["rest"] + ids["stable"]
    assert second.class_pixels == tuple(np.add(parts["stable"].class_pixels, second_own_pixels(second)))
    with pytest.raises(InputError, match="--with: .* labelled with another codebook"):
        job.main([runs["one_hot"], *arguments[1:]])


def second_own_pixels(manifest):
    table = [read_metadata_of(manifest, file) for file in manifest.files if not file.name.startswith("../")]
    return np.sum(np.concatenate(table), axis=0)


def read_metadata_of(manifest, file):
    return pq.read_table(f"{manifest.url}/{file.name}", columns=["class_pixels"]).column("class_pixels").to_pylist()


def test_damaged_images_stay_without_a_label(job, runs, tmp_path, capsys):
    url = str(tmp_path / "pool")
    good = list(records())[:5]
    write_shards(good, url, dataset="tiny", classes=CLASSES)
    damage_rows(url, {2: {"image": good[2].image[:60]}})
    out = str(tmp_path / "out")
    assert job.main([runs["ecoc"], url, "--out", out, "--workers", "1", "--device", "cpu"]) == 0
    assert "1 image(s) do not decode" in capsys.readouterr().out and "image-2" in (tmp_path / "out" / "skipped.txt").read_text()
    rows = list(iter_rows(read_manifest(out), columns=COLUMNS))
    assert [row["image_id"] for row in rows] == [record.image_id for record in good]
    assert rows[2]["weight"] == 0 and rows[2]["image"] == good[2].image[:60] and rows[2]["stability"] is None
    assert all(row["weight"] >= 0 and row["bits"] is not None for row in rows[:2] + rows[3:])


# ---- killed and gone on with, in a bucket ------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
                        "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    connection = http.client.HTTPConnection(f"{host}:{port}", timeout=10)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    yield f"http://{host}:{port}"
    ray.shutdown()
    running.stop()


def test_killed_half_way_in_a_bucket_and_gone_on_with_by_ray(job, tiny, pool, labelled, bucket, capsys, monkeypatch):
    storage = Storage(endpoint=bucket)
    run = make_run(tiny, "s3://bucket/run", "ecoc", storage)
    storage.upload_dir(pool.url, "s3://bucket/pool")
    arguments = [run, "s3://bucket/pool", "--out", "s3://bucket/out", "--endpoint", bucket, "--device", "cpu", "--threshold",
                 str(THRESHOLD), "--checkpoints", f"{run}/checkpoints/step_00000001"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments, "--workers", "1"], stderr=subprocess.PIPE)
    notes: list[str] = []
    deadline = time.monotonic() + 120
    while len(notes) < 2 and time.monotonic() < deadline and process.poll() is None:
        notes = storage.list_files("s3://bucket/out/.packing")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = storage.list_files("s3://bucket/out/.packing")
    assert 2 <= len(done) < len(pool.files) and not storage.exists("s3://bucket/out/manifest.json")
    by_ray, numbers = labelling._in_parallel, []
    monkeypatch.setattr(labelling, "_in_parallel", lambda jobs, *rest: numbers.extend(job.number for job in jobs)
                        or by_ray(jobs, *rest))
    assert job.main([*arguments, "--workers", "2"]) == 0
    output = capsys.readouterr()
    done_before = [int(name[6:11]) for name in done]
    assert sorted(numbers + done_before) == list(range(len(pool.files)))
    rows = sum(pool.files[number].rows for number in done_before)
    assert f"going on: {rows} of {IMAGES} images were labelled before" in output.err
    made = read_manifest("s3://bucket/out", storage)
    assert [row["image_id"] for row in iter_rows(made, storage=storage)] == [f"image-{n}" for n in range(IMAGES)]
    assert made.files == labelled["ecoc"].files  # byte for byte what one process makes of local files in one go
    assert storage.list_files("s3://bucket/out", recursive=True) == sorted(
        ["class_pixels.arrow", "manifest.json", *(f.name for f in made.files)])
    assert job.main(arguments) == 0 and read_manifest("s3://bucket/out", storage) == made  # nothing is left to do


# ---- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bits", [7, 40, 64, 70])
def test_words_as_planes_and_back(num_bits):
    words = bits.pack(torch.rand(num_bits, 2 * 3 * 5, generator=torch.Generator().manual_seed(0)) < 0.5)
    words_BXHW = words.view(-1, 2, 3, 5).transpose(0, 1)
    planes = bits.to_planes(words_BXHW, num_bits)
    assert planes.shape == (2, (num_bits + 7) // 8, 3, 5) and planes.dtype == torch.uint8
    dense = bits.unpack(words, num_bits).view(num_bits, 2, 3, 5)
    assert all(torch.equal((planes[:, k // 8] >> k % 8) & 1, dense[k].to(torch.uint8)) for k in range(num_bits))
    assert torch.equal(bits.from_planes(planes), words_BXHW)


def test_agreement_is_the_mean_iou_of_classes_that_either_has():
    a = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 2, 2]]])
    b = torch.tensor([[[0, 1, 1, 1]], [[2, 2, 2, 2]]])
    assert agreement(a, b, 4).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0])


def test_batches_are_of_one_size_and_lose_nothing():
    from ecocseg.labelling_shard import Decoded

    sizes = [(4, 4), (4, 5), (4, 4), (4, 4), (5, 4), (4, 5)] * 4
    items = [Decoded(n, {}, torch.zeros(3, *size)) for n, size in enumerate(sizes)]
    found = list(by_size(items, 3))
    assert all(len({one.image_CHW.shape for one in batch}) == 1 and len(batch) <= 3 for batch in found)
    assert sorted(one.number for batch in found for one in batch) == list(range(24)) and len(found) == 9


def test_bad_input_is_named(job, runs, pool, tmp_path):
    common = ["--device", "cpu", "--workers", "1"]
    with pytest.raises(InputError, match="--out: .* is the pool itself"):
        job.main([runs["ecoc"], pool.url, "--out", pool.url, *common])
    with pytest.raises(InputError, match="--keep: .*give --checkpoints"):
        job.main([runs["ecoc"], pool.url, "--out", str(tmp_path), "--keep", "0.5", *common])
    with pytest.raises(InputError, match="--checkpoints: the one of step 1 has other classes or another codebook"):
        job.main([runs["ecoc"], pool.url, "--out", str(tmp_path), *common,
                  "--checkpoints", f"{runs['one_hot']}/checkpoints/step_00000001"])
    with pytest.raises(InputError, match=r"--workers 999: there are .*CPU\(s\), and each worker takes one"):
        job.main([runs["ecoc"], pool.url, "--out", str(tmp_path), "--device", "cpu", "--workers", "999"])


# ---- training from the shards ------------------------------------------------------------------------------------------


def whole_batches(manifest, **changes):
    """The set once, uncropped: 13 batches of two images, by the stream that training reads."""
    transform = WeakTransform(crop=(48, 64), flip=0.0, max_class_share=1.0, planes=pseudo.num_planes(manifest), **changes)
    with Stream(manifest, name="unlabeled", seed=0, global_batch=2, transform=transform, loader="torch",
                columns=("image_id", "image", "mask", *pseudo.COLUMNS)) as stream:
        return [next(stream)[0] for _ in range(IMAGES // 2)]


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_a_stream_gives_the_very_target_that_the_checkpoint_gave(kind, runs, labelled):
    seen = set()
    for batch in whole_batches(labelled[kind]):
        coding, _ = expected(runs[kind], batch.image[0])
        stored = coding.stored(batch.labels, batch.changes, batch.weight)
        for at, name in enumerate(batch.image_ids):
            rows, columns = batch.valid[at].any(1).sum(), batch.valid[at].any(0).sum()
            _, target = expected(runs[kind], batch.image[at, :, :rows, :columns])
            assert torch.equal(stored.labels[at, :rows, :columns], target.labels[0])
            assert kind == "one_hot" or torch.equal(stored.bits[at, :, :rows, :columns], target.bits[0])
            share = float((target.confidence >= THRESHOLD).double().mean())
            assert stored.weight[at].unique().tolist() == pytest.approx([share], abs=1e-7)
            assert (stored.labels[at][~batch.valid[at]] == 255).all()
            seen.add(name)
        box = torch.rand(stored.labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        mixed = mixing.mix(coding.encode(torch.zeros_like(stored.labels)), stored, box)
        assert torch.equal(mixed.weight[~box], stored.weight[~box]) and torch.equal(mixed.is_true, box)
        if kind == "ecoc":
            assert torch.equal(mixed.bits.movedim(1, -1)[~box], stored.bits.movedim(1, -1)[~box])
    assert len(seen) == IMAGES


@pytest.mark.parametrize("turn", [False, True])
def test_bits_go_through_the_same_geometry_as_the_mask(turn):
    rng = np.random.default_rng(0)
    image, mask = scene(3, 0)
    labels = rng.integers(0, 4, (48, 64)).astype(np.uint8)
    planes = np.stack([labels * 7, 255 - labels])
    transform = WeakTransform(crop=(40, 40), scale=(0.6, 1.6), flip=0.5, planes=2, turn=turn)
    crops = set()
    for seed in range(12):
        sample = transform(image, encode_png(labels), np.random.default_rng(seed), bits_bytes=pseudo.encode_bits(planes))
        plain = transform(image, encode_png(labels), np.random.default_rng(seed))
        assert np.array_equal(sample.labels, plain.labels) and np.array_equal(sample.image, plain.image)
        known = sample.labels != 255
        assert np.array_equal(sample.changes[0][known], sample.labels[known] * 7) and not sample.changes[:, ~known].any()
        turned = known & (sample.changes[1] != 0)  # corners that a rotation brings in are 0 in all
        assert np.array_equal(sample.changes[1][turned], 255 - sample.labels[turned]) and (turn or turned.sum() == known.sum())
        crops.add(sample.changes.tobytes())
    assert len(crops) > 6
    with pytest.raises(InputError, match="image_id 'x': its bits do not decode"):
        transform(image, encode_png(labels), rng, image_id="x", bits_bytes=pseudo.encode_bits(planes)[:20])


def config_for(tiny, labelled, root, kind, **changes):
    plain = {"coding__kind": kind, "data__unlabeled": labelled[kind].url, "method__kind": "supervised",
             "method__pseudo_labels": True, "train__steps": 3, "train__eval_every": 0, "train__panels_every": 3,
             "train__checkpoint_every": 0}
    return tiny_config(tiny, root, **plain | changes)


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_the_loss_is_that_of_the_labels_weighed(kind, tiny, labelled, runs, tmp_path):
    config = config_for(tiny, labelled, tmp_path, kind, method__cutout_probability=0.0, method__jitter_probability=0.0,
                        method__blur_probability=0.0)
    batch = next(b for b in whole_batches(labelled[kind]) if b.valid.all() and b.weight.min() != b.weight.max())
    coding, target = expected(runs[kind], batch.image[0])
    targets = [expected(runs[kind], image)[1] for image in batch.image]
    logits = torch.randn(2, coding.num_outputs, 12, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for at, target in enumerate(targets):
        target.weight = torch.full_like(target.weight, float(batch.weight[at]))
        losses.append(coding.loss(logits[at:at + 1], target)["loss"])
    method = Supervised(config.method, coding, Normalize())
    shown = []
    given = StepInput(0, 0, batch, batch, lambda image: shown.append(image) or logits, None, None)
    assert torch.allclose(method.stored_loss(given), torch.stack(losses).mean(), rtol=1e-5)
    assert torch.allclose(shown[0], Normalize()(batch.image), atol=1e-5)
    given.unlabeled_divisors = torch.tensor([1000.0])
    wanted = torch.stack(losses).mean() * batch.labels.numel() / 1000
    assert torch.allclose(method.stored_loss(given), wanted, rtol=1e-5)
    cut = Supervised(config.updated(method={"cutout_probability": 1.0, "average": "valid"}).method, coding, Normalize())
    boxes = cut.cutouts(given)
    assert 0 < boxes.sum() < boxes.numel() / 2 and int(cut.unlabeled_pixels(given)) == int((~boxes).sum())
    cut.stored_loss(given)
    assert not torch.equal(shown[-1][0][:, boxes[0]], shown[0][0][:, boxes[0]])
    assert torch.allclose(shown[-1][0][:, ~boxes[0]], shown[0][0][:, ~boxes[0]], atol=1e-5)


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_training_steps_from_labelled_shards_beside_true_labels_and_alone(kind, tiny, labelled, tmp_path):
    for name, changes in (("both", {}), ("valid", {"method__average": "valid"}),
                          ("alone", {"method__pseudo_labels": False, "data__labeled": labelled[kind].url})):
        records = []
        config = config_for(tiny, labelled, tmp_path, kind, **changes)
        run_worker(config, str(tmp_path / f"{kind}-{name}"), World(0, 1, torch.device("cpu")),
                   lambda message, records=records: records.append(message) or False)
        last = [record for record in records if record["kind"] == "progress" and "loss/labeled" in record][-1]
        assert last["step"] == 3 and np.isfinite(last["loss/labeled"])
        assert ("loss/pseudo" in last) == (name != "alone")
        if name != "alone":
            assert last["loss/pseudo"] > 0 and 0 < last["pseudo/weight"] < 1


def test_what_does_not_fit_is_refused_before_training(tiny, labelled, tmp_path):
    def refused(match, kind="ecoc", **changes):
        config = config_for(tiny, labelled, tmp_path, kind, **changes)
        with pytest.raises(InputError, match=match):
            preflight(config, str(tmp_path / "run"))

    preflight(config_for(tiny, labelled, tmp_path, "ecoc"), str(tmp_path / "run"))
    refused("data.unlabeled: the pseudo-labels in .* are of another codebook .*; label the pool with a checkpoint of this",
            coding__codebook={"kind": "max_min", "length": 6})
    refused("data.unlabeled: .* another codebook .one-hot, none, this run", data__unlabeled=labelled["one_hot"].url)
    refused("data.unlabeled: .* has no pseudo-labels; make them with jobs/pseudo_label", data__unlabeled=str(tiny / "target"))
    other = tmp_path / "other"
    shutil.copytree(labelled["ecoc"].url, other)
    names = dataclasses.replace(CLASSES, names=("ground", "block", "stripe", "cloud"))
    (other / "manifest.json").write_bytes(dataclasses.replace(labelled["ecoc"], classes=names).to_json())
    refused("data.unlabeled: .*/other has the classes of 'tiny', data.labeled those of 'tiny'; pack both with one class list",
            data__unlabeled=str(other))
    refused("data.eval.val: the masks in .* are pseudo-labels", data__eval={"val": labelled["ecoc"].url})
    refused("data.labeled: the masks in .* are pseudo-labels, which method.kind=self_training", method__kind="self_training",
            method__pseudo_labels=False, data__labeled=labelled["ecoc"].url, data__unlabeled=str(tiny / "target"))
    with pytest.raises(InputError, match="method.pseudo_labels: method.kind=mic makes its labels itself"):
        config_for(tiny, labelled, tmp_path, "ecoc", method__kind="mic")
