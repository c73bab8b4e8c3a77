"Backbones of every layout learn, are drawn on and take weights; all that the issue names, by name."
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from skinlesion.explain.cam import compute_cam, is_flat
from skinlesion.explain.layers import cell_layout, default_layer, target_layers
from skinlesion.files import repo_root
from skinlesion.model.backbones import (
    TESTED,
    Standardise,
    allowed_sizes,
    attends,
    backbone_config,
    backbone_layers,
    built_size,
    channel_axis,
    create_backbone,
    describe_backbones,
    size_problem,
    to_cells,
    to_maps,
)

WEIGHTS = repo_root().parent / "shared" / "data" / "weights" / "mobilenetv2_100_imagenet.safetensors"
FAST = ("small_cnn_3", "small_cnn_4", "resnet10t", "mobilenetv2_100", "test_vit")
SWIN = dict(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2)
ALL = [*FAST, "tiny swin", *(pytest.param(name, marks=pytest.mark.slow) for name in TESTED if name not in FAST)]

# Millions of parameters with the 1000 classes of ImageNet, as timm's own table of results states them.
PUBLISHED = {
    "efficientnet_b0": 5.29,
    "densenet121": 7.98,
    "resnet50": 25.56,
    "convnext_tiny": 28.59,
    "convnext_base": 88.59,
    "tf_efficientnetv2_s": 21.46,
    "tf_efficientnetv2_m": 54.14,
    "swinv2_tiny_window8_256": 28.35,
    "swinv2_base_window8_256": 87.92,
    "seresnext50_32x4d": 27.56,
    "seresnext101_32x8d": 93.57,
    "mobilenetv2_100": 3.50,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small_backbone(name):
    "A backbone for small images, and their side."
    if name == "tiny swin":
        return timm.create_model("swinv2_tiny_window8_256", num_classes=0, **SWIN), 64
    side = 56 if "patch14" in name else 64
    return create_backbone(name, image_size=side), side


def planted(count, seed, side=64):
    "Noisy pictures, every second one with a bright block, and the corner of the quarter it lies in."
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=rng) * .3
    corners = torch.randint(2, (count, 2), generator=rng) * side // 2
    for image, (y, x) in zip(images[1::2], corners[1::2]):
        image[:, y + side // 8:y + side * 3 // 8, x + side // 8:x + side * 3 // 8] += 2
    return images, torch.arange(count) % 2, corners


def pointed(cams, corners):
    "The share of maps whose peak lies in the block's quarter."
    half = cams.shape[-1] // 2
    peaks = np.array([np.unravel_index(cam.argmax(), cam.shape) for cam in cams])
    return (peaks // half == corners.numpy() // half).all(1).mean()


@pytest.mark.parametrize("name", ALL)
def test_forward_backward_and_maps(name):
    "Two images pass forward, a gradient reaches every weight, and each offered layer gives a map in the right place."
    torch.manual_seed(0)
    backbone, side = small_backbone(name)
    images = torch.randn(2, 3, side, side)
    features = backbone.forward_features(images)
    pooled = backbone.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, getattr(backbone, "head_hidden_size", None) or backbone.num_features)
    maps = to_maps(backbone, features)
    cells = to_cells(backbone, features)
    assert maps.shape[1] == backbone.num_features and cells.shape == (2, maps.shape[2] * maps.shape[3], maps.shape[1])
    assert channel_axis(backbone, features) == (-1 if attends(backbone) else 1)
    pooled.square().sum().backward()
    missing = [k for k, p in backbone.named_parameters() if p.grad is None]
    assert not missing and any(p.grad.abs().sum() > 0 for p in backbone.parameters())

    backbone.reset_classifier(3)
    layers = target_layers(backbone)
    found = cell_layout(backbone, layers, (side, side))
    assert list(found) == [n for n, _ in backbone_layers(backbone)] and default_layer(backbone, (side, side)) in layers
    for layer, (down, across) in found.items():
        assert down == across and down.cells * down.pitch >= side - down.pitch  # the cells tile the picture
        assert -down.pitch < down.first < down.pitch
    for method, targets in (("gradcam", range(3)), ("eigencam", range(1))):
        cams = np.array([compute_cam(backbone, images, method=method, targets=[t] * 2) for t in targets])
        assert cams.shape[1:] == (2, side, side) and cams.min() >= 0 and cams.max() <= 1
        assert not is_flat(cams).all(), (name, method)  # of a class that everything speaks against, a map is empty
    assert backbone.training and not any(m._forward_hooks for m in backbone.modules())


@pytest.mark.parametrize("name", ["small_cnn_3", "mobilenetv2_100", pytest.param("resnet50", marks=pytest.mark.slow),
                                  pytest.param("tf_efficientnetv2_s", marks=pytest.mark.slow),
                                  pytest.param("convnext_tiny", marks=pytest.mark.slow),
                                  pytest.param("densenet121", marks=pytest.mark.slow)])
def test_cells_lie_where_they_look(name):
    "A convolution's cell is moved most by the pixels on which it is said to be centred."
    torch.manual_seed(0)
    side = 160
    backbone = create_backbone(name).eval()
    layer, module = backbone_layers(backbone)[-3]
    down, across = cell_layout(backbone, {layer: module}, (side, side))[layer]
    image = torch.randn(1, 3, side, side, requires_grad=True)
    seen = []
    handle = module.register_forward_hook(lambda m, i, out: seen.append(to_maps(backbone, out, m)))
    backbone.forward_features(image)
    handle.remove()
    cell = down.cells // 2
    weights = torch.randn(seen[0].shape[1])
    grad = torch.autograd.grad((seen[0][0, :, cell, cell] * weights).sum(), image)[0].square().sum((0, 1))
    centre = [float((grad.sum(1 - a) * torch.arange(side)).sum() / grad.sum()) for a in (0, 1)]
    expected = down.first + down.pitch * cell
    assert max(abs(c - expected) for c in centre) < down.pitch / 2, (name, layer, centre, expected)


@pytest.mark.parametrize("name", ["test_vit", "tiny swin"])
def test_tokens_lie_where_they_are_drawn(name):
    "What enters the first layer of a transformer at a place comes out at that place."
    torch.manual_seed(0)
    backbone = small_backbone(name)[0].eval()
    embed = backbone.patch_embed
    cells = 64 // backbone.patch_embed.patch_size[0]
    with torch.no_grad():
        embed.proj.bias.zero_()
        image = torch.zeros(1, 3, 64, 64)
        image[..., 48:, 16:32] = 1
        seen = embed.proj(image).abs().sum((0, 1)) > 0
        found = {}
        handle = embed.register_forward_hook(lambda m, i, out: found.update(out=out))
        backbone.forward_features(image)
        handle.remove()
    step = cells // 4
    want = torch.zeros(cells, cells, dtype=torch.bool)
    want[3 * step:, step:2 * step] = True
    assert torch.equal(seen, want)
    lit = to_maps(backbone, found["out"], embed)
    blank = lit[0, :, 0, 0]
    assert torch.equal((lit[0] - blank[:, None, None]).abs().sum(0) > 1e-5, want)


KINDS = {
    "small": ("small_cnn_3", {}, 10, 5e-3),
    "swin": ("swinv2_tiny_window8_256", SWIN, 40, 5e-3),
    "vit": ("test_vit", dict(img_size=64, patch_size=8, depth=4), 40, 2e-3),
    "average": ("test_vit", dict(img_size=64, patch_size=8, depth=4, global_pool="avg", class_token=False), 40, 2e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_block_lights_up(kind, seed):
    "A network that was trained to find a block points at it, in each layout; the notebook shows the maps."
    name, extra, steps, rate = KINDS[kind]
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=2, **extra)
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        images, targets, _ = planted(16, step)
        F.cross_entropy(model.train()(images), targets).backward()
        optimiser.step(), optimiser.zero_grad()
    images, targets, corners = planted(40, 1000)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == targets).float().mean() > .9
    assert pointed(compute_cam(model, images[1::2], targets=[1] * 20), corners[1::2]) >= .9


def test_standardised_images_are_the_backbones_own():
    "Every backbone's own normalisation of a picture is what it gets from one that was normalised with ImageNet's."
    pixels = torch.rand(2, 3, 8, 8)
    for name in TESTED + FAST:
        config = backbone_config(name)
        own, ours = ((pixels - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
                     for m, s in ((config.mean, config.std), (Standardise.__init__.__defaults__)))
        torch.testing.assert_close(Standardise(config.mean, config.std)(ours), own, atol=1e-5, rtol=0)


def test_local_weights_fill_a_backbone(tmp_path):
    "A real file of weights loads whole, but for its classifier; into another architecture it does not."
    if not WEIGHTS.is_file():
        pytest.skip(f"no weights at {WEIGHTS.name} beside the repository")
    state = load_file(WEIGHTS)
    backbone = create_backbone("mobilenetv2_100", str(WEIGHTS))
    kept = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    assert set(kept) == set(backbone.state_dict()) and all(
        torch.equal(v, kept[k]) for k, v in backbone.state_dict().items()
    )
    with pytest.raises(ValueError, match="does not fit backbone 'mobilenetv2_110d': .*missing .*unknown|wrong shape"):
        create_backbone("mobilenetv2_110d", str(WEIGHTS))
    del state["bn2.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=re.escape("1 missing (bn2.weight)")):
        create_backbone("mobilenetv2_100", str(tmp_path / "w.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name, made, wanted", [
    ("vit_small_patch14_dinov2", 98, 56),
    ("swinv2_tiny_window8_256", 128, 64),
])
def test_weights_of_another_size_are_resampled(tmp_path, name, made, wanted):
    "Weights saved at one image size fill the backbone built for another; all but the position tables are untouched."
    donor = create_backbone(name, image_size=made)
    path = tmp_path / "w.safetensors"
    save_file(donor.state_dict(), path)
    filled = create_backbone(name, str(path), image_size=wanted)
    old = donor.state_dict()
    assert built_size(filled) == wanted
    assert {k for k, v in filled.state_dict().items() if not torch.equal(v, old[k])} == (
        {"pos_embed"} if "vit" in name else set()
    )


@pytest.mark.parametrize("name, size", [
    ("test_vit", 100),
    pytest.param("vit_small_patch14_dinov2", 225, marks=pytest.mark.slow),
])
def test_sizes_that_cannot_be_are_named(name, size):
    "An impossible size stops where the model is built, with sizes that were tried; each of those builds."
    with pytest.raises(ValueError, match="set image_size to one of") as e:
        create_backbone(name, image_size=size)
    offered = [int(n) for n in re.search(r"one of ([\d, ]+) \(", str(e.value))[1].split(",")]
    assert len(offered) >= 4 and all(built_size(create_backbone(name, image_size=n)) == n for n in offered)


@pytest.mark.slow
def test_sizes_of_others():
    "What a size or a rate of stochastic depth cannot be, for three families."
    assert (
        256 in allowed_sizes("swinv2_tiny_window8_256", 250)
        and size_problem("densenet121", 16)
        and not size_problem("densenet121", 32)
    )
    with pytest.raises(ValueError, match="densenet121' has no stochastic depth"):
        create_backbone("densenet121", drop_path_rate=.1)


def test_same_seed_same_weights():
    "The random weights depend on the generator's state alone."
    for name in ("small_cnn_3", "test_vit"):
        torch.manual_seed(3)
        first = create_backbone(name).state_dict()
        torch.manual_seed(3)
        assert all(torch.equal(v, first[k]) for k, v in create_backbone(name).state_dict().items())


@pytest.mark.slow
def test_the_table_agrees_with_the_literature():
    "Every tested backbone has its published size (without classifier), a count of operations, and a licence."
    table = describe_backbones().set_index("name")
    assert (
        list(table.index) == list(TESTED)
        and table.gflops.notna().all()
        and table.licence.ne("").all()
        and table.weights.ne("").all()
    )
    for name, millions in PUBLISHED.items():
        width = create_backbone(name).num_features
        assert table.parameters[name] + (width + 1) * 1000 / 1e6 == pytest.approx(millions, abs=.01), name
    assert table.gflops["resnet50"] / 2 == pytest.approx(
        4.1, abs=0.05
    ) # He et al. 2016 count multiply-adds: 3.8 to 4.1 by variant
    assert table.gflops["convnext_tiny"] / 2 == pytest.approx(4.5, abs=.05)  # Liu et al. 2022, table 9


def test_a_time_is_the_median_of_the_runs_that_count(monkeypatch):
    "The first two runs are left out; of 10, 40 and 20 ms the middle one is given."
    clock = np.cumsum([0, 5, 0, 7, 0, .010, 0, .040, 0, .020])
    monkeypatch.setattr("skinlesion.model.backbones.perf_counter", iter(clock).__next__)
    table = describe_backbones(("small_cnn_3",), image_size=32, time=True, runs=3)
    assert table.cpu_ms.tolist() == [pytest.approx(20)]
    assert list(table) == ["name", "pixels", "parameters", "gflops", "cpu_ms", "licence", "weights"]
