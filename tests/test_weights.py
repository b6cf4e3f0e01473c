"""Pretrained weights: where they may come from, which keys must load, and files that are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from test_models import TINY, tiny

from ecocseg.errors import InputError
from ecocseg.models.segmenter import Segmenter, describe


def same_weights(model: Segmenter, donor: dict[str, torch.Tensor]) -> bool:
    """Whether each encoder tensor is among the donor's, in order of registration."""
    own = {k: v for k, v in model.encoder.net.state_dict().items() if "num_batches" not in k}
    theirs = [v for k, v in donor.items() if "num_batches" not in k][:len(own)]
    return len(theirs) == len(own) and all(torch.equal(a, b) for a, b in zip(own.values(), theirs, strict=True))


def test_a_vits_weights_load_and_its_head_is_left_out(tmp_path):
    donor = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save(donor, tmp_path / "vit.pth")
    model = tiny("vit_tiny_patch16_224", "dpt", pretrained=str(tmp_path / "vit.pth"))
    assert torch.equal(model.encoder.net.norm.weight, donor["norm.weight"])
    assert torch.equal(model.encoder.net.pos_embed, donor["pos_embed"]) and "head.weight" in model.weights_note


@pytest.mark.parametrize("encoder", [TINY, "resnet18", "convnext_atto"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_timm_classifier_file_loads_and_its_classifier_is_reported(encoder, suffix, tmp_path):
    torch.manual_seed(5)
    donor, path = timm.create_model(encoder).state_dict(), tmp_path / f"weights{suffix}"
    save_file(donor, path) if suffix == ".safetensors" else torch.save(donor, path)
    model = tiny(encoder, pretrained=str(path))
    assert same_weights(model, donor)
    assert "left out" in describe(model) and str(path) in describe(model)


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"decode_head.w": torch.ones(1)}},
    lambda s: {f"encoder.net.{k}": v for k, v in s.items()} | {"decoder.w": torch.ones(1)}])
def test_segformer_release_keys_load_under_any_wrapping(wrap, tmp_path):
    torch.manual_seed(5)
    net = smp.encoders.get_encoder("mit_b0", weights=None).state_dict()
    assert "patch_embed1.proj.weight" in net and "block1.0.attn.q.weight" in net  # names of the SegFormer release
    classifier = {"head.weight": torch.ones(1000, 256), "head.bias": torch.ones(1000)}
    torch.save(wrap(net | classifier), tmp_path / "mit_b0.pth")
    for head in ("daformer", "smp:Unet"):
        assert same_weights(tiny("mit_b0", head, pretrained=str(tmp_path / "mit_b0.pth")), net)


def test_mmsegmentation_deep_stem_names(tmp_path):
    donor = timm.create_model("resnet50c", num_classes=0).state_dict()
    renamed = {k.replace("conv1.", "stem.", 1) if k.startswith("conv1.") else k.replace("bn1.", "stem.7.", 1)
               if k.startswith("bn1.") else k: v for k, v in donor.items()}
    assert "stem.7.running_mean" in renamed
    torch.save(renamed, tmp_path / "v1c.pth")
    assert same_weights(tiny("resnet50c", "deeplabv2", pretrained=str(tmp_path / "v1c.pth")), donor)


@pytest.fixture
def donor() -> dict[str, torch.Tensor]:
    return smp.encoders.get_encoder("mit_b0", weights=None).state_dict()


def load(donor: dict, tmp_path: Path, **options) -> Segmenter:
    torch.save(donor, tmp_path / "weights.pth")
    return tiny("mit_b0", pretrained=str(tmp_path / "weights.pth"), **options)


def test_keys_that_do_not_load_are_an_error_unless_allowed(donor, tmp_path):
    del donor["norm4.weight"], donor["norm4.bias"]
    donor["strange.key"] = torch.ones(1)
    donor["patch_embed1.proj.bias"] = torch.ones(7)
    with pytest.raises(InputError) as error:
        load(donor, tmp_path)
    text = str(error.value)
    assert "2 missing in the file (norm4.weight, norm4.bias)" in text and "strange.key" in text
    assert "patch_embed1.proj.bias (7,) instead of (32,)" in text and "allow_missing" in text
    with pytest.raises(InputError, match="strange.key") as error:
        load(donor, tmp_path, allow_missing=["norm4.*", "patch_embed1.proj.bias"])
    assert "norm4" not in str(error.value).split(";")[0]
    model = load(donor, tmp_path, allow_missing=["norm4.*", "strange.*", "patch_embed1.proj.bias"])
    assert torch.equal(model.encoder.net.norm3.weight, donor["norm3.weight"])
    assert torch.equal(model.encoder.net.block2[0].attn.q.weight, donor["block2.0.attn.q.weight"])
    assert all(name in model.weights_note for name in ("norm4.weight", "strange.key", "patch_embed1.proj.bias"))


def test_weights_of_another_encoder_are_refused_even_when_all_is_allowed(donor, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(InputError, match="does not fit encoder 'mit_b0'"):
        tiny("mit_b0", pretrained=str(tmp_path / "resnet18.pth"))
    with pytest.raises(InputError, match="no weights at all"):
        tiny("mit_b0", pretrained=str(tmp_path / "resnet18.pth"), allow_missing=["*"])


def test_first_convolution_adapts_to_grey_images(donor, tmp_path):
    torch.save(donor, tmp_path / "weights.pth")
    model = tiny("mit_b0", pretrained=str(tmp_path / "weights.pth"), in_channels=1)
    expected = donor["patch_embed1.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.encoder.net.patch_embed1.proj.weight.data, expected)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [lambda content, path: torch.save(content, path),
                                  lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_that_would_run_code_is_refused_and_runs_none(save, donor, tmp_path):
    exploded = tmp_path / "exploded"
    save({**donor, "extra": Bomb(exploded)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="safetensors"):
        tiny("mit_b0", pretrained=str(tmp_path / "bad.pth"))
    assert not exploded.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False) if save.__code__.co_names[0] == "torch" else pickle.loads(
        (tmp_path / "bad.pth").read_bytes())
    assert exploded.exists()  # the file was live: a careless reader would have run it


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_empty_and_absent_files(suffix, donor, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(donor, path) if suffix == ".safetensors" else torch.save(donor, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="weights"):
        tiny("mit_b0", pretrained=str(path))
    with pytest.raises(InputError, match="no file"):
        tiny("mit_b0", pretrained=str(tmp_path / f"absent{suffix}"))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="no named tensors"):
        tiny("mit_b0", pretrained=str(tmp_path / "empty.pth"))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub that has no address, and nothing of it kept from before."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))


@pytest.mark.parametrize(("encoder", "pretrained"), [
    ("mit_b0", "default"), ("resnet18", "default"), ("resnet18", "a1_in1k"), ("resnet18", "resnet18.a1_in1k"),
    ("resnet18", "hf-hub:timm/resnet18.a1_in1k"), ("resnet18", "https://hub.invalid/resnet18.pth")])
def test_without_network_the_message_says_how_to_pass_a_file(encoder, pretrained, no_network):
    with pytest.raises(InputError, match="without network.*model.pretrained=/path/to"):
        tiny(encoder, pretrained=pretrained)


def test_unknown_tags_list_the_known_ones():
    with pytest.raises(InputError, match="resnet101c.gluon_in1k"):
        tiny("resnet101c", "deeplabv2", pretrained="imagenet22k")


def test_a_url_is_fetched_once(donor, tmp_path, monkeypatch):
    torch.save(donor, tmp_path / "release.pth")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    fetched = []

    def download(url: str, path: str, **options) -> None:
        fetched.append(url)
        Path(path).write_bytes((tmp_path / "release.pth").read_bytes())
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):
        assert same_weights(tiny("mit_b0", pretrained="https://example.org/a/release.pth?raw=1"), donor)
    assert fetched == ["https://example.org/a/release.pth?raw=1"]
    tiny("mit_b0", pretrained="https://example.org/b/release.pth")  # same file name, another URL
    assert len(fetched) == 2


def test_weights_come_from_the_runs_own_storage(donor, tmp_path):
    class Bucket:
        def read_bytes(self, url: str) -> bytes:
            if url != "s3://bucket/mit_b0.pth":
                raise FileNotFoundError(url)
            return (tmp_path / "mit_b0.pth").read_bytes()
    torch.save(donor, tmp_path / "mit_b0.pth")
    assert same_weights(tiny("mit_b0", pretrained="s3://bucket/mit_b0.pth", storage=Bucket()), donor)
    with pytest.raises(InputError, match="could not be read"):
        tiny("mit_b0", pretrained="s3://bucket/absent.pth", storage=Bucket())
