"""Encoders, heads and parameter groups. B 2, K 5 and images of 97 x 130 unless said."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from ecocseg.errors import InputError
from ecocseg.models.heads import PooledContext
from ecocseg.models.segmenter import Segmenter, build_segmenter, describe, parameter_groups

TINY = "mobilenetv3_small_100"
HEADS = ["daformer", "deeplabv2", "segformer", "deeplabv3plus", "pspnet", "unet", "dpt", "smp:Unet"]


def tiny(encoder: str = TINY, head: str = "segformer", **options) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(encoder, head, options.pop("num_outputs", 5), channels=16, **options)


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


# Sizes


def test_published_size_of_daformer():
    with torch.device("meta"):
        model = build_segmenter("mit_b5", "daformer", 19)
    assert millions(model) == pytest.approx(85.16, rel=1e-3)  # DAFormer, MiT-B5, 19 classes
    assert "85.16 M" in describe(model) and "encoder 81.44 M" in describe(model)


PUBLISHED = [  # encoder, head, outputs, options, millions of parameters, source
    ("resnet101s", "deeplabv3plus", 21, {"output_stride": 16}, 59.5),  # UniMatch, VOC
    ("resnet50s", "deeplabv3plus", 21, {"output_stride": 16}, 40.5),  # UniMatch, VOC
    ("xception65", "deeplabv3plus", 81, {"output_stride": 16}, 54.7),  # UniMatch, COCO
    ("resnet50s", "pspnet", 2, {"output_stride": 8, "siamese": True}, 46.7),  # UniMatch, change detection
    ("unet", "unet", 4, {"in_channels": 1}, 1.8),  # UniMatch, cardiac slices; 1.814 here
    ("vit_small_patch14_dinov2.lvd142m", "dpt", 21, {}, 24.8),  # UniMatch V2, DINOv2-S
    ("vit_base_patch14_dinov2.lvd142m", "dpt", 21, {}, 97.5),  # UniMatch V2, DINOv2-B
]


@pytest.mark.parametrize(("encoder", "head", "outputs", "options", "published"), PUBLISHED)
def test_published_sizes_of_unimatch(encoder, head, outputs, options, published):
    with torch.device("meta"):
        model = build_segmenter(encoder, head, outputs, **options)
        longer = build_segmenter(encoder, head, outputs + 10, **options)
    # The sources give one decimal.
    assert millions(model) == pytest.approx(published, rel=0.005, abs=0.05 if published < 10 else None)
    last = model.decoder.classify if isinstance(model.decoder.classify, nn.Conv2d) else model.decoder.classify[-1]
    per_output = last.weight[0].numel() + 1
    assert round((millions(longer) - millions(model)) * 1e6) == 10 * per_output  # other outputs change the last layer alone


def test_dacs_model_has_a_dilated_resnet_and_a_bare_head():
    with torch.device("meta"):
        model = build_segmenter("resnet101c", "deeplabv2", 19, output_stride=8)
    assert model.encoder.strides == (4, 8, 8, 8)
    assert millions(model.decoder) * 1e6 == 2 * (2048 * 19 * 9 + 19)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.Dropout2d)) for m in model.decoder.modules())


# Shapes and gradients


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ["mit_b0", TINY, "resnet18"])
def test_any_size_goes_through_and_every_parameter_learns(encoder, head):
    model = tiny(encoder, head, dropout=0.0).train()
    logits, feature = model(torch.randn(2, 3, 97, 130), return_features=True)
    stride, finer = {"smp:Unet": 1, "deeplabv2": 32, "pspnet": 32}.get(head, 4), 2 if head == "dpt" else 1
    assert logits.shape == (2, 5, finer * math.ceil(97 / stride), finer * math.ceil(130 / stride))
    assert feature.shape[2:] == (4, 5) and feature.shape[1] == model.encoder.channels[-1]
    logits.square().sum().backward()
    # A bias before a batch norm may get a gradient of zero, but never none.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    dead = [n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1 and not p.grad.any()]
    # New ResNets end their residual branches with a norm of weight zero, so those branches wait for one step.
    assert [n for n in dead if not (encoder == "resnet18" and ".layer" in n)] == []


@pytest.mark.parametrize("encoder", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224",
                                     "hrnet_w18_small", "regnety_002", "eva02_tiny_patch14_224", "unet"])
def test_encoders_that_need_padding_or_another_layout(encoder):
    model = tiny(encoder, "segformer").eval()
    stride = model.encoder.strides[0]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 97, 130)).shape == (1, 5, math.ceil(97 / stride), math.ceil(130 / stride))


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_dinov3",
                                     "vit_base_patch16_siglip_224", "resnet18", "mit_b0", "convnext_atto"])
def test_dpt_on_plain_and_hierarchical_encoders(encoder):
    model = tiny(encoder, "dpt", drop_path=0.0 if encoder == "resnet18" else 0.1).train()
    patch = model.encoder.strides[0] if len(set(model.encoder.strides)) == 1 else None
    size = (3 * patch, 5 * patch) if patch else (64, 96)
    logits, feature = model(torch.randn(2, 3, *size), return_features=True)
    assert logits.shape == ((2, 5, 24, 40) if patch else (2, 5, 32, 48))
    assert feature.shape[1:] == ((model.encoder.channels[-1], 3, 5) if patch else (model.encoder.channels[-1], 2, 3))
    assert len(model.encode(torch.randn(2, 3, 33, 50))) == 4 == len(model.feature_dropout_levels)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # none for DDP to wait for


def test_maps_of_a_vit_are_its_normalised_tokens():
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    model = tiny("vit_tiny_patch16_224", "dpt").eval()
    model.encoder.net.load_state_dict(net.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        tokens = net.forward_features(image)[:, 1:]  # normalised, without the class token
        maps = model.encode(image)
        x = net.pos_drop(net._pos_embed(net.patch_embed(image)))
        for block in net.blocks[:6]:
            x = block(x)
    torch.testing.assert_close(maps[3].flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), net.norm(x)[:, 1:])


def test_psp_pools_parts_of_the_image():
    model = tiny("resnet18", "pspnet").eval()
    features = torch.randn(2, 512, 12, 12)
    pool = model.decoder.pools[2]
    parts = features.view(2, 512, 3, 4, 3, 4).mean((3, 5))
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(pool.project(parts), (12, 12), mode="bilinear", align_corners=True)
        torch.testing.assert_close(pool(features), wanted)
    model.train()
    with pytest.raises(InputError, match="two images"):
        model(torch.randn(1, 3, 64, 64))


def test_unet_takes_grey_images_as_they_are_or_as_three_equal_channels():
    model = tiny("unet", "unet", in_channels=1).eval()
    grey = torch.randn(1, 1, 40, 56)
    with torch.no_grad():
        logits = model(grey)
        assert logits.shape == (1, 5, 40, 56) and [m.shape[1] for m in model.encode(grey)] == [16, 32, 64, 128, 256]
        torch.testing.assert_close(model(grey.expand(-1, 3, -1, -1)), logits)


@pytest.mark.parametrize(("encoder", "head"), [("resnet18", "pspnet"), ("resnet18", "deeplabv3plus"), ("unet", "unet"),
                                               ("mit_b0", "smp:Unet")])
def test_siamese_compares_two_dates(encoder, head):
    model, plain = tiny(encoder, head, siamese=True).eval(), tiny(encoder, head).eval()
    before, after = torch.randn(2, 2, 3, 70, 50)
    pair, swapped = torch.cat([before, after], 1), torch.cat([after, before], 1)
    with torch.no_grad():
        maps = [(a - b).abs() for a, b in zip(plain.encode(before), plain.encode(after), strict=True)]
        torch.testing.assert_close(model(pair), plain.decode(maps, (70, 50)))
        torch.testing.assert_close(model(pair), model(swapped))
        assert not model.encode(torch.cat([before, before], 1))[-1].any()


def test_padding_leaves_the_logits_where_they_were():
    model = tiny("resnet18", "smp:Unet").eval()
    image = torch.zeros(1, 3, 128, 160)
    image[..., :97, :130] = torch.randn(3, 97, 130)
    with torch.no_grad():
        torch.testing.assert_close(model(image[..., :97, :130]), model(image)[..., :97, :130])


def test_images_smaller_than_an_attention_window():
    assert tiny("mit_b0").eval()(torch.randn(1, 3, 9, 17)).shape == (1, 5, 3, 5)


@pytest.mark.parametrize("head", ["daformer", "smp:Unet"])
def test_encode_then_decode_is_forward(head):
    model, image = tiny("mit_b0", head).eval(), torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        maps = model.encode(image)
        logits, feature = model(image, return_features=True)
        assert torch.equal(model.decode(maps, (70, 50)), logits) and torch.equal(maps[-1], feature)


@pytest.mark.parametrize(("head", "levels"), [
    ("deeplabv3plus", (0, 3)), ("deeplabv2", (3,)), ("daformer", (0, 1, 2, 3)), ("smp:Unet", (1, 2, 3, 4, 5)),
    ("pspnet", (3,)), ("unet", (0, 1, 2, 3)), ("dpt", (0, 1, 2, 3))])
def test_levels_of_feature_dropout_are_those_the_decoder_reads(head, levels):
    model = tiny("resnet18", head).eval()
    assert model.feature_dropout_levels == levels
    with torch.no_grad():
        maps = model.encode(torch.randn(1, 3, 64, 64))
        logits = model.decode(maps, (64, 64))
        for level in range(len(maps)):
            other = [m + (i == level) for i, m in enumerate(maps)]
            assert torch.equal(model.decode(other, (64, 64)), logits) == (level not in levels)


@pytest.mark.parametrize("encoder", ["mit_b0", "resnet18"])
def test_channels_last_gives_the_same_logits(encoder):
    model, image = tiny(encoder, "daformer").eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain = model(image)
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(image.to(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-5)


def test_output_stride_and_other_channels():
    model = tiny("resnet18", "deeplabv3plus", output_stride=8, in_channels=1)
    assert model.encoder.strides[-1] == 8
    assert [branch[0].dilation[0] for branch in model.decoder.branches[1:4]] == [12, 24, 36]
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5, 16, 16)
    assert tiny("mit_b0", in_channels=4)(torch.randn(2, 4, 64, 64)).shape == (2, 5, 16, 16)


def test_one_image_in_training_is_refused_by_the_pooled_branch():
    model = tiny(head="deeplabv3plus").train()
    with pytest.raises(InputError, match="two images"):
        model(torch.randn(1, 3, 64, 64))
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize("encoder", ["mit_b0", "resnet18", "resnet18d", "convnext_atto", "vit_tiny_patch16_224", "unet"])
def test_recomputed_activations_change_nothing_but_memory(encoder):
    image, results = torch.randn(2, 3, 64, 64), []
    for recompute in (False, True):
        model = tiny(encoder, drop_path=0.0 if encoder == "unet" else 0.3, activation_checkpointing=recompute).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(1)
            maps = model.encode(image)
        sum(m.square().mean() for m in maps).backward()
        gradients = {name: p.grad for name, p in model.encoder.named_parameters()}
        results.append((sum(saved), gradients, dict(model.named_buffers())))
    (plain_memory, plain, plain_buffers), (memory, gradients, buffers) = results
    assert memory < 0.6 * plain_memory
    torch.testing.assert_close(gradients, plain)
    torch.testing.assert_close(buffers, plain_buffers)  # running statistics are updated once, not twice


def test_drop_path_is_set_and_off_by_default():
    def rates(model: Segmenter) -> list[float]:
        return [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates(tiny("mit_b0", drop_path=0.1))) == pytest.approx(0.1)
    assert max(rates(tiny("mit_b0")), default=0) == 0
    assert max(rates(tiny("mit_b0", "smp:Unet")), default=0) == 0


def test_a_copy_shares_nothing_and_agrees():
    model = tiny("mit_b0", activation_checkpointing=True).eval()
    twin, image = copy.deepcopy(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        assert torch.equal(twin(image), before)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(model(image), before)


@pytest.mark.parametrize(("options", "message"), [
    ({"encoder": "resnett18"}, "resnet18"),
    ({"encoder": "mit_b7"}, "mit_b5"),
    ({"head": "daforner"}, "did you mean daformer"),
    ({"head": "smp:Unett"}, "smp:Unet"),
    ({"head": "smp:Unet", "encoder": "resnett18"}, "resnet18"),
    ({"head": "smp:Unet", "output_stride": 8}, "smp:DeepLabV3Plus"),
    ({"head": "smp:Unet", "drop_path": 0.1}, "drop_path"),
    ({"head": "smp:Unet", "activation_checkpointing": True}, "activation_checkpointing"),
    ({"encoder": "mit_b0", "output_stride": 8}, "stride 32"),
    ({"encoder": "swin_tiny_patch4_window7_224", "output_stride": 8}, "output_stride"),
    ({"output_stride": 7}, "8, 16 or 32"),
    ({"encoder": "unet", "head": "unet", "drop_path": 0.1}, "unet has neither"),
    ({"encoder": "unet", "head": "dpt"}, "four feature maps, and the encoder gives 5"),
    ({"encoder": "vit_tiny_patch16_224", "output_stride": 8}, "its patch as its only stride"),
    ({"activation_checkpointing": True}, "activation_checkpointing"),
])
def test_bad_requests_name_the_key_and_the_remedy(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


# Parameter groups


@pytest.mark.parametrize("encoder", ["mit_b0", "resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("no_decay", ["norm_and_position", "none"])
def test_every_parameter_is_in_one_group(encoder, no_decay):
    model = tiny(encoder)
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, 10.0, 0.05, no_decay)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert all(g["lr"] == g["initial_lr"] for g in groups.values())
    assert groups["decoder"]["lr"] == pytest.approx(1e-2) and groups["encoder"]["lr"] == 1e-3
    assert {id(p) for p in groups["decoder"]["params"]} == {id(p) for p in model.decoder.parameters()}
    assert groups["encoder"]["weight_decay"] == groups["decoder"]["weight_decay"] == 0.05
    assert ("encoder_no_decay" in groups) == (no_decay == "norm_and_position")
    torch.optim.AdamW(list(groups.values()))


def test_norms_and_positions_are_spared_as_in_daformer():
    model = tiny("mit_b0")
    spared = {id(p) for p in parameter_groups(model, 1.0, 10.0, 0.01, "norm_and_position")[1]["params"]}
    by_name = {id(p) for n, p in model.encoder.named_parameters() if "norm" in n}  # the pattern of DAFormer's config
    assert spared == by_name
    vit = tiny("vit_tiny_patch16_224")
    spared = {id(p) for p in parameter_groups(vit, 1.0, 10.0, 0.01, "norm_and_position")[1]["params"]}
    assert any(id(p) in spared for n, p in vit.named_parameters() if "pos_embed" in n)


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = tiny("mit_b0")
    model.encoder.requires_grad_(False)
    assert [g["name"] for g in parameter_groups(model, 1.0, 10.0, 0.01, "norm_and_position")] == ["decoder"]


def test_one_image_a_worker_is_enough_where_norms_see_all_workers_images(monkeypatch: pytest.MonkeyPatch) -> None:
    context = PooledContext(4, 8).train()
    image = torch.randn(1, 4, 3, 3)
    with pytest.raises(InputError, match="two images or more"):
        context(image)
    together = torch.nn.SyncBatchNorm.convert_sync_batchnorm(context)
    with pytest.raises(InputError, match="two images or more"):  # of one worker
        together(image)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    together.project[1].forward = lambda x: x  # it takes GPU tensors alone
    assert together(image).shape == (1, 8, 3, 3)
    with pytest.raises(InputError, match="two images or more"):
        PooledContext(4, 8).train()(image)
