"""The built-in scenes: the same everywhere, settled by a hash, all classes in both domains, domains that differ."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecocseg.data import demo
from ecocseg.data.shards import iter_rows, read_manifest
from ecocseg.data.sources import demo as source


@pytest.fixture(scope="module")
def scenes():
    return {domain: [demo.render(index, domain) for index in range(24)] for domain in demo.DOMAINS}


def test_the_settled_scenes_are_drawn():
    assert len(demo.SCENES_HASH) == 64
    assert demo.scenes_hash() == demo.SCENES_HASH


def test_a_scene_follows_from_seed_index_and_domain_alone(scenes):
    np.random.seed(123)  # a global state of another kind changes nothing
    for domain, drawn in scenes.items():
        image, mask = demo.render(5, domain)
        assert np.array_equal(image, drawn[5][0]) and np.array_equal(mask, drawn[5][1])
        assert not np.array_equal(image, demo.render(5, domain, seed=1)[0])
        assert not np.array_equal(image, drawn[6][0])


def test_a_scene_is_the_same_in_another_process(scenes):
    code = ("import hashlib; from ecocseg.data import demo; "
            "print(hashlib.sha256(demo.render(3, 'target')[0].tobytes()).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[1]).stdout.strip()
    assert other == hashlib.sha256(scenes["target"][3][0].tobytes()).hexdigest()


def test_sizes_and_ids(scenes):
    for drawn in scenes.values():
        for image, mask in drawn:
            assert image.shape == (demo.HEIGHT, demo.WIDTH, 3) and image.dtype == np.uint8
            assert mask.shape == (demo.HEIGHT, demo.WIDTH) and mask.dtype == np.uint8
            assert mask.max() < demo.CLASSES.num_classes


def test_all_classes_occur_in_both_domains(scenes):
    assert 8 <= demo.CLASSES.num_classes <= 12
    for domain, drawn in scenes.items():
        images_with = np.array([np.bincount(mask.reshape(-1), minlength=demo.CLASSES.num_classes) > 0 for _, mask in drawn])
        assert (images_with.sum(0) >= 2).all(), (domain, images_with.sum(0))
        assert images_with.sum(1).min() >= 4  # no empty street


def test_classes_are_where_a_street_has_them(scenes):
    for drawn in scenes.values():
        rows = {kind: np.concatenate([np.nonzero(mask == kind)[0] for _, mask in drawn]) for kind in (demo.ROAD, demo.SKY)}
        assert rows[demo.SKY].mean() < demo.HEIGHT / 3 < demo.HEIGHT / 2 < rows[demo.ROAD].mean()


def test_domains_share_their_geometry_and_differ_in_their_looks(scenes):
    share = {d: np.bincount(np.concatenate([m.reshape(-1) for _, m in s]), minlength=11) for d, s in scenes.items()}
    share = {d: counts / counts.sum() for d, counts in share.items()}
    assert np.abs(share["source"] - share["target"]).max() < 0.12  # the same kind of street
    assert not np.array_equal(scenes["source"][0][1], scenes["target"][0][1])  # but never the same one

    def texture(drawn):
        """Mean change between neighbours inside road and sky: noise, stains and shadows, no edges of things."""
        changes = []
        for image, mask in drawn:
            grey = image.astype(float).mean(2)
            inside = (mask[:, 1:] == mask[:, :-1]) & np.isin(mask[:, 1:], (demo.ROAD, demo.SKY))
            changes.append(np.abs(np.diff(grey, axis=1))[inside].mean())
        return float(np.mean(changes))

    assert texture(scenes["target"]) > 1.5 * texture(scenes["source"])
    means = {d: np.mean([i.reshape(-1, 3).mean(0) for i, _ in s], axis=0) for d, s in scenes.items()}
    assert np.abs(means["source"] - means["target"]).max() > 8


def test_parts_are_disjoint_and_the_pool_has_no_masks(tmp_path):
    made = source.prepare(str(tmp_path), counts=dict.fromkeys(source.PARTS, 2))
    assert set(made) == set(source.PARTS)
    names = []
    for part, (domain, _, _, labeled) in source.PARTS.items():
        manifest = read_manifest(f"{tmp_path}/{part}")
        assert manifest == made[part] and manifest.classes == demo.CLASSES
        assert (manifest.num_rows, manifest.num_labeled) == (2, 2 if labeled else 0)
        for row in iter_rows(manifest, columns=["image_id", "image", "mask", "group", "index"]):
            names.append(row["image_id"])
            image, mask = demo.render(row["index"], domain)
            if labeled:
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["mask"]))), mask)
            decoded = np.asarray(Image.open(io.BytesIO(row["image"]))).astype(float)
            assert np.abs(decoded - image).mean() < 6  # a JPEG of that scene
    assert len(set(names)) == len(names)
    spans = [(domain, first, first + count) for domain, first, count, _ in source.PARTS.values()]
    assert not any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for i, a in enumerate(spans) for b in spans[:i])
