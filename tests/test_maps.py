"Maps of evidence: every method on every family of backbones and every fusion, or the sentence that says why not."

import gc
import typing
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import FullGrad

from skinlesion.explain.cam import MAP_METHODS, compute_cam, is_flat
from skinlesion.explain.layers import target_layers
from skinlesion.explain.passes import MapPass
from skinlesion.images import read_image, save_png
from skinlesion.model.fusion import create_model
from skinlesion.pipeline.params import ExplainParams
from skinlesion.use.predict import Predictor
from tiny import build_bundle, build_pictures

SIDE = 64
SWIN = dict(img_size=SIDE, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4)
FAMILIES = {
    "small CNN": dict(model_name="small_cnn_3"),
    "MobileNet": dict(model_name="mobilenetv2_100"),
    "EfficientNet": dict(model_name="test_efficientnet"),
    "ConvNeXt": dict(model_name="test_convnext"),
    "Swin": dict(model_name="swinv2_tiny_window8_256", **SWIN),
    "ViT": dict(model_name="test_vit", img_size=SIDE),
    "ViT without class token": dict(
        model_name="vit_base_patch16_gap_224", img_size=SIDE, embed_dim=16, depth=2, num_heads=2),
}
REFUSED = {
    ("rollout", family): "needs a vision transformer" for family in FAMILIES if "ViT" not in family
} | {
    ("fullgrad", family): "FullGrad needs batch norms" for family in FAMILIES
    if "ViT" in family or family in ("ConvNeXt", "Swin")
}
QUICK = "EfficientNet", "ViT"  # families on which `make test` tries the slow methods too
FUSIONS = ("none", "concat", "film", "metablock", "gated", "cross_attention")


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    return request.param, timm.create_model(num_classes=3, **FAMILIES[request.param]).eval()


def check_family(model, name, method, pictures):
    "Maps of two classes, in range, the same alone as in a batch; or the sentence that says why there is none."
    if (method, name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, name]):
            compute_cam(model, pictures, method=method)
        return
    maps = np.array([compute_cam(model, pictures, method=method, targets=[target] * 2) for target in range(2)])
    assert maps.shape == (2, 2, SIDE, SIDE) and maps.dtype == np.float32
    assert maps.min() >= 0 and maps.max() <= 1
    assert not is_flat(maps).all()  # of a class that everything speaks against, a map is empty
    alone = compute_cam(model, pictures[1:], method=method, targets=[0])[0]
    np.testing.assert_allclose(alone, maps[0, 1], atol=2e-3)
    differs = np.abs(maps[0] - maps[1]).max() > 1e-3
    assert differs == MAP_METHODS[method].knows_class


@pytest.mark.parametrize("method", [name for name, method in MAP_METHODS.items() if not method.slow])
def test_every_quick_method_on_every_family(family, method, pictures):
    check_family(family[1], family[0], method, pictures)


@pytest.mark.parametrize("method", [name for name, method in MAP_METHODS.items() if method.slow])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def test_every_slow_method_on_every_family(name, method, pictures):
    torch.manual_seed(0)
    check_family(timm.create_model(num_classes=3, **FAMILIES[name]).eval(), name, method, pictures)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion(fusion, pictures):
    "The metadata of each image stand still, in every way in which they are joined."
    metadata = torch.tensor([[1., 0., -1.], [-1., 1., 0.]])
    options = dict(metadata_dim=3, fusion=fusion) if fusion != "none" else {}
    model = create_model("resnet10t", num_classes=3, seed=0, **options)
    people = metadata if model.takes_metadata else None
    small = pictures[..., :32, :32]
    for method in ("gradcam", "ablationcam", "integrated"):
        maps = np.array([compute_cam(model, small, people, method, targets=[target] * 2) for target in range(3)])
        assert maps.shape == (3, 2, 32, 32) and not is_flat(maps).all(), method
        if people is not None:
            second = compute_cam(model, small[1:], people[1:], method, targets=[2])
            np.testing.assert_allclose(second[0], maps[2, 1], atol=2e-3, err_msg=method)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_full_grad_is_that_of_grad_cam_where_it_finds_the_biases(pictures):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Softplus(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten()).eval()
    torch.nn.init.uniform_(model[1].bias)
    with FullGrad(model, []) as theirs:
        expected = theirs(pictures.clone(), None)
    np.testing.assert_allclose(compute_cam(model, pictures, method="fullgrad"), expected, atol=1e-5)


def test_the_parameters_offer_every_method():
    offered = typing.get_args(typing.get_args(ExplainParams.model_fields["methods"].annotation)[0])
    assert list(offered) == list(MAP_METHODS)


def test_one_pass_serves_every_layer_and_class(pictures):
    model = create_model("resnet10t", num_classes=3, seed=0)
    asked = []
    handle = model.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    run = MapPass(model, pictures, layers=tuple(target_layers(model)))
    for target in range(3):
        for layer in run.layers:
            run.towards([target] * 2).gradients(layer)
    handle.remove()
    assert asked == [2]


def test_a_map_at_the_default_layer_costs_one_pass(pictures):
    "The layer is found with the first map; where its cells look is told by the pass itself."
    model = create_model("resnet10t", num_classes=3, seed=0)
    asked = []
    compute_cam(model, pictures)
    handle = model.backbone.conv1.register_forward_hook(lambda module, args, output: asked.append(output))
    compute_cam(model, pictures)
    handle.remove()
    assert [len(output) for output in asked] == [2] and not asked[0].requires_grad


def test_many_maps_leave_nothing_behind():
    "The same map after many others, and no tensor that stays."
    model = create_model("small_cnn_3", num_classes=3, seed=0)
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    first = compute_cam(model, picture, targets=[0])

    def tensors():
        gc.collect()
        return sum(type(thing) in (torch.Tensor, torch.nn.Parameter) for thing in gc.get_objects())

    before = tensors()
    for _ in range(50):
        last = compute_cam(model, picture, targets=[0])
    assert tensors() == before
    np.testing.assert_array_equal(first, last)


def compiled(model):
    return torch.compile(deepcopy(model), backend="eager")


def compiled_in_place(model):
    model = deepcopy(model)
    model.compile(backend="eager")
    return model


def half(model):
    return deepcopy(model).half()


def quantised(model):
    "The model with dynamically quantised linear layers."
    return torch.ao.quantization.quantize_dynamic(deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


@pytest.fixture(scope="module", params=["small_cnn_3", "test_vit"])
def plain(request):
    return create_model(request.param, num_classes=3, image_size=32, seed=0).eval()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:torch.ao.quantization")
@pytest.mark.parametrize("change", [compiled, compiled_in_place, half, quantised])
def test_every_method_on_a_model_that_was_changed(plain, change, pictures):
    "The map of the plain model, or one sentence where a gradient cannot be followed; never a blank map."
    changed = change(plain)
    picture = pictures[:1, :, :32, :32]  # a CPU is slow in half precision
    with torch.no_grad():
        changed(picture.half() if change is half else picture)  # a compiled one is compiled now
    for method, about in MAP_METHODS.items():
        words = dict(method=method, targets=[1])
        refused = REFUSED.get((method, "ViT" if plain.config["backbone"] == "test_vit" else "EfficientNet"))
        told = refused
        if change is quantised and about.follows_gradient:
            told = "follows a gradient, but layer '.*' of this model is quantised"
        if refused:  # no method for this family
            with pytest.raises(ValueError, match=refused):
                compute_cam(plain, picture, **words)
        if told:
            with pytest.raises(ValueError, match=told):
                compute_cam(changed, picture, **words)
            continue
        expected = compute_cam(plain, picture, **words)
        cam = compute_cam(changed, picture, **words)
        assert not is_flat(cam), method
        if change is not quantised:
            assert np.corrcoef(cam.ravel(), expected.ravel())[0, 1] > .98, method


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    return Predictor(build_bundle(folder / "bundle")), build_pictures(folder)["a"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:torch.ao.quantization")
def test_an_ensemble_of_changed_models(predictor):
    "Compiled members are explained as they are; of quantised ones a method without a gradient tells."
    original, picture = predictor
    for change in (compiled, quantised):
        other = deepcopy(original)
        other.members = tuple(replace(member, model=change(member.model)) for member in original.members)
        other.torch_bundle = replace(original.bundle, members=other.members)
        expected = original.explain(picture, "eigencam", "layer3")
        np.testing.assert_allclose(other.explain(picture, "eigencam", "layer3").cam, expected.cam, atol=1e-4)
        assert other.layers() == original.layers()
    with pytest.raises(ValueError, match="Grad-CAM follows a gradient, but layer 'heads.diagnosis' of this model is"):
        other.explain(picture, "gradcam")


@pytest.mark.parametrize("side", [8, 60])
def test_a_small_and_a_grey_picture(predictor, side, tmp_path):
    "A picture of eight pixels or without colours has maps of its own size."
    loaded, picture = predictor
    grey = read_image(picture)[:side, :side, 1]
    for name, pixels in dict(grey=grey, colours=np.stack([grey, 255 - grey, grey // 2], 2)).items():
        drawn = loaded.explain(save_png(pixels, tmp_path / f"{name}.png"), "layercam", mask=np.eye(side) > 0)
        assert drawn.overlay().shape == (side, side, 3) and (drawn.overlay() != drawn.image).any()
        assert 0 < drawn.scores["energy_inside"] < 1 and drawn.scores["lesion_share"] == pytest.approx(1 / side)
    with pytest.raises(ValueError, match=r"the mask is bool of shape \(9, 8\); give bool of the shape of the picture"):
        loaded.explain(picture, mask=np.ones((9, 8), bool))


def test_a_layer_without_a_place_is_named(pictures):
    "A vector, a single cell, or tokens behind the last one that is read: no map, and what to choose instead."
    model = create_model("resnet10t", num_classes=3, seed=0)
    for method in ("gradcam", "eigencam", "scorecam", "ablationcam"):
        with pytest.raises(ValueError, match="layer 'global_pool' has no place in the picture"):
            compute_cam(model, pictures, method=method, layer="global_pool")
        with pytest.raises(ValueError, match="layer 'layer4' gives one cell for the whole picture of 32 x 32 pixels"):
            compute_cam(model, pictures[..., :32, :32], method=method, layer="layer4")
    vit = create_model("test_vit", num_classes=3, image_size=SIDE, seed=0)
    for method in ("gradcam", "layercam", "ablationcam"):
        with pytest.raises(ValueError, match="layer 'blocks.5' (reaches the score through the class|has no influence)"):
            compute_cam(vit, pictures, method=method, layer="blocks.5")
