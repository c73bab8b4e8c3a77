"""The measures of maps beside those of the package Quantus: the same figures where the definition is the same.

Quantus is needed for nothing else; where it is not installed this file is skipped. To run it, in this folder:

    uv pip install -c constraints.txt -e '.[quantus]'
    pytest tests/test_quantus.py
    python tests/test_quantus.py        # prints the table of the guide

uv, because pip would install opencv-python too, which overwrites cv2 (see [tool.uv] in pyproject.toml).
"""
import functools
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest

quantus = pytest.importorskip("quantus", reason="the extra quantus is not installed")

import numpy as np
import torch
from quantus.functions.perturb_func import noisy_linear_imputation
from quantus.functions.similarity_func import correlation_spearman
from quantus.helpers.model.pytorch_model import PyTorchModel
from skimage.metrics import structural_similarity
from torch import nn

from skinlesion.explain import removal
from skinlesion.explain.cam import compute_cam
from skinlesion.explain.faithfulness import energy_inside, mask_overlap, peak_inside, random_maps
from skinlesion.explain.removal import blur_filling, curve_area, removal_curve, road_scores, skin_filling
from skinlesion.explain.sanity import (
    map_correlation, map_similarity, max_sensitivity, other_targets, randomisation_table, randomised_copies,
)
from skinlesion.images import normalise, resize_image, resize_mask
from skinlesion.model.fusion import create_model
from skinlesion.synthetic.draw import synthesise
from skinlesion.taxonomy import get_label_set

N = 14  # pictures
SIDE = 60  # pixels
STEPS = 12  # of a curve, equal shares of the pixels
PATCH = 10  # pixels a side
SHARES = (0.1, 0.3, 0.5, 0.7)  # of the pixels that ROAD takes away
AS_THEY_ARE = dict(abs=False, normalise=False, disable_warnings=True)  # our maps are not negative and at most 1


class Layer(nn.Conv2d):
    "A convolution that draws its random weights apart from torch's generator: both packages get the same ones."

    def reset_parameters(self):
        lot = torch.Generator().manual_seed(self.in_channels)
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5, generator=lot)
        nn.init.zeros_(self.bias)


class Grey(nn.Module):
    "A model of three channels, for pictures of one."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.expand(-1, 3, -1, -1))


def small_model(images):
    "Three convolutions whose weights are not those of `reset_parameters`; half of the images in each of two classes."
    layers = [Layer(3, 8, 5, padding=2), Layer(8, 16, 3, padding=1, stride=2), Layer(16, 2, 1)]
    lot = torch.Generator().manual_seed(7)
    for layer in layers:
        nn.init.normal_(layer.weight, std=4 * layer.weight[0].numel() ** -0.5, generator=lot)
    first, second, head = layers
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        head.bias -= model(images).median(0).values
    return model


def predict_with(model):
    "The probabilities of a model, as `removal_curve` asks for them."
    @torch.no_grad()
    def predict(images, rows):
        return model(images).softmax(1).numpy()
    return predict


def explain(model, inputs, targets, **_):
    "Maps (N,H,W), as Quantus asks for them."
    images = torch.as_tensor(np.asarray(inputs), dtype=torch.float32)
    return compute_cam(model, images, method="layercam", layer="2", targets=list(targets))


@pytest.fixture(scope="module")
def case():
    return make_case()


def make_case():
    "Drawn pictures with their outlines, a small model, the classes it predicts and its maps."
    codes = get_label_set("ham10000").codes
    drawn = [synthesise(codes[k % 7], np.random.default_rng(k)) for k in range(N)]
    images = normalise(np.stack([resize_image(picture.image, SIDE) for picture in drawn]))
    masks = np.stack([resize_mask(picture.lesion, SIDE) for picture in drawn])
    model = small_model(images)
    targets = predict_with(model)(images, None).argmax(1)
    # Equal pixels are ordered by lot here, in Quantus by their place in memory: no two pixels are equal.
    maps = explain(model, images, targets) + 0.001 * np.random.default_rng(0).random((N, SIDE, SIDE))
    return SimpleNamespace(images=images, masks=masks, model=model, targets=targets, maps=maps / maps.max())


def ask(metric, case, **changes):
    "What a measure of Quantus says of the case."
    asked = dict(
        model=case.model, x_batch=case.images.numpy(), y_batch=case.targets, a_batch=case.maps,
        s_batch=case.masks[:, None], channel_first=True,
    )
    return metric(**asked | changes)


def compare_energy(case):
    return energy_inside(case.maps, case.masks), ask(quantus.RelevanceMassAccuracy(**AS_THEY_ARE), case)


def compare_localisation(case):
    metric = quantus.AttributionLocalisation(**AS_THEY_ARE | dict(abs=True))  # or it prints a warning
    return energy_inside(case.maps, case.masks), ask(metric, case)


def compare_peak(case):
    return peak_inside(case.maps, case.masks), ask(quantus.PointingGame(**AS_THEY_ARE), case)


def compare_overlap(case):
    "The share of the lesion among the k brightest pixels says how large intersection and union are."
    overlap, threshold = mask_overlap(case.maps, case.masks)
    brightest = (case.maps >= threshold).sum((1, 2))
    lesion = case.masks.sum((1, 2))
    shares = np.array([
        ask(quantus.TopKIntersection(k=int(k), **AS_THEY_ARE), case)[image] for image, k in enumerate(brightest)])
    shared = shares * brightest
    return overlap, shared / (brightest + lesion - shared)


def put(filling):
    "A change of Quantus that puts pixels of other pictures in."
    flat = filling.reshape(N, -1).numpy()
    def replace(arr, indices, **_):
        changed = arr.copy()
        np.put_along_axis(changed, indices, np.take_along_axis(flat, indices, 1), 1)
        return changed
    return replace


def darkest(images):
    "The filling that Quantus takes unless told: the smallest value of each picture."
    return images.amin((1, 2, 3), keepdim=True).expand_as(images)


def our_curve(case, filling, maps=None, insert=False, steps=STEPS):
    maps = case.maps if maps is None else maps
    return removal_curve(predict_with(case.model), case.images, maps, case.targets, filling, insert, steps)


def flipping(**options):
    "Pixel flipping in our steps: a pixel is three values."
    return quantus.PixelFlipping(features_in_step=3 * SIDE * SIDE // STEPS, **AS_THEY_ARE, **options)


def compare_deletion(case):
    "The curve of Quantus starts after the first step."
    ours = our_curve(case, darkest(case.images))[:, 1:]
    return ours, ask(flipping(), case, softmax=True)


def compare_deletion_blur(case):
    blurred = blur_filling(case.images)
    return our_curve(case, blurred)[:, 1:], ask(flipping(perturb_func=put(blurred)), case, softmax=True)


def compare_insertion_skin(case):
    skin = skin_filling(case.images, case.masks)
    theirs = ask(flipping(perturb_func=put(case.images)), case, x_batch=skin.numpy(), softmax=True)
    return our_curve(case, skin, insert=True)[:, 1:], theirs


def compare_area(case):
    "The area of Quantus is in steps, and calls a function that NumPy has renamed."
    with mock.patch.object(np, "trapz", np.trapezoid, create=True):
        theirs = ask(flipping(return_auc_per_sample=True), case, softmax=True)
    return curve_area(our_curve(case, darkest(case.images))[:, 1:]), np.divide(theirs, STEPS - 1)


def compare_regions(case):
    "Squares in the order of their means."
    cells = SIDE // PATCH
    means = case.maps.reshape(N, cells, PATCH, cells, PATCH).mean((2, 4))
    maps = means.repeat(PATCH, 1).repeat(PATCH, 2)
    curve = our_curve(case, darkest(case.images), maps, steps=cells**2)
    metric = quantus.RegionPerturbation(patch_size=PATCH, regions_evaluation=cells**2, **AS_THEY_ARE)
    return curve[:, :1] - curve[:, 1:], ask(metric, case, softmax=True)


WITHOUT_NOISE = mock.patch.object(
    removal, "NoisyLinearImputer", functools.partial(removal.NoisyLinearImputer, noise=0.0))


def compare_imputed(case):
    "The pictures that the model is asked about, with the most important pixels missing."
    asked = []
    def predict(images, rows):
        asked.append(images.numpy())
        return np.zeros((len(images), 2))
    with WITHOUT_NOISE:
        road_scores(predict, case.images, case.maps, case.targets, SHARES[:1])
    missing = np.argsort(-case.maps.reshape(N, -1), 1)[:, :round(SHARES[0] * SIDE * SIDE)]
    theirs = [noisy_linear_imputation(image, m, noise=0.0) for image, m in zip(case.images.numpy(), missing)]
    return asked[1], theirs


def compare_road(case):
    "Whether the class is still predicted, picture by picture; of one channel, as Quantus fails on three."
    grey = case.images[:, :1].contiguous()
    model = Grey(small_model(grey.expand(-1, 3, -1, -1))).eval()
    targets = model(grey).argmax(1).numpy()
    def hit(images, rows):
        return np.eye(2)[predict_with(model)(images, rows).argmax(1)]
    with WITHOUT_NOISE:
        ours = [road_scores(hit, grey, case.maps, targets, (share,)) for share in SHARES]
    metric = quantus.ROAD(percentages=[round(100 * share) for share in SHARES], noise=0.0, **AS_THEY_ARE)
    theirs = []
    for row in range(N):
        one = slice(row, row + 1)
        asked = dict(model=model, x_batch=grey.numpy()[one], y_batch=targets[one], s_batch=None)
        most = ask(metric, case, a_batch=case.maps[one], **asked)
        least = ask(metric, case, a_batch=1 - case.maps[one], **asked)
        theirs.append([(least[p] - most[p]) / 2 for p in most])
    return ours, np.transpose(theirs)


def compare_correlation(case):
    other = random_maps(N, SIDE, SIDE)
    theirs = correlation_spearman(case.maps.reshape(N, -1), other.reshape(N, -1), batched=True)
    return map_correlation(case.maps, other), theirs


def gaussian_similarity(a, b, **_):
    "SSIM as in its paper, of maps that Quantus hands over as rows of pixels."
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    first, second = (rows.reshape(-1, SIDE, SIDE).astype(np.float64) for rows in (a, b))
    return np.array([structural_similarity(*pair, **options) for pair in zip(first, second)])


def compare_random_weights(case):
    "A layer at a time, from the last; rank correlations of the maps, layer by layer."
    table = randomisation_table(
        case.model, lambda model: dict(layercam=explain(model, case.images, case.targets)), parts=3)
    metric = quantus.MPRT(layer_order="top_down", **AS_THEY_ARE)
    found = ask(metric, case, a_batch=explain(case.model, case.images, case.targets), explain_func=explain)
    return table.correlation.to_numpy().reshape(3, N), [found[name] for name in ("4", "2", "0")]


def compare_other_class(case, ours=map_correlation, theirs=correlation_spearman):
    "With two classes there is only one other."
    own = explain(case.model, case.images, case.targets)
    other = explain(case.model, case.images, other_targets(case.targets, 2))
    metric = quantus.RandomLogit(similarity_func=theirs, num_classes=2, **AS_THEY_ARE)
    return ours(own, other), ask(metric, case, a_batch=own, explain_func=explain)


def compare_similarity(case):
    return compare_other_class(case, map_similarity, gaussian_similarity)


def compare_sensitivity(case):
    "The same noise for both."
    lot = torch.Generator().manual_seed(0)
    def shake(arr, indices, **_):
        noise = torch.rand(case.images.shape, generator=lot) * 2 - 1
        return arr + 0.1 * noise.reshape(arr.shape).numpy()
    metric = quantus.MaxSensitivity(nr_samples=8, perturb_func=shake, **AS_THEY_ARE)
    theirs = ask(metric, case, a_batch=explain(case.model, case.images, case.targets), explain_func=explain)
    return max_sensitivity(case.images, lambda images: explain(case.model, images, case.targets)), theirs


class Row(NamedTuple):
    "A line of the table in the guide."
    ours: str  # function of `skinlesion.explain`
    theirs: str  # of Quantus
    same: str  # whether the definition is the same; else in which way it differs and how Quantus was set for this test
    compare: Callable  # case -> our figures, theirs
    bound: float  # of the largest difference


ROWS = [
    Row("`energy_inside`", "`RelevanceMassAccuracy`", "yes", compare_energy, 1e-12),
    Row("`energy_inside`", "`AttributionLocalisation`", "yes, but for the 1e-9 it adds to the sum of a map",
        compare_localisation, 1e-9),
    Row("`peak_inside`", "`PointingGame`",
        "where a map has one peak; of several equal ones any may hit there, here the first counts", compare_peak, 0),
    Row("`mask_overlap`", "`TopKIntersection`",
        "no: it has no overlap, which follows from its share of the lesion among the k brightest pixels",
        compare_overlap, 1e-12),
    Row("`removal_curve`", "`PixelFlipping`",
        "with steps of whole pixels; it takes each channel for a pixel and leaves out the whole picture",
        compare_deletion, 1e-6),
    Row("`removal_curve`, into blur", "`PixelFlipping`", "with our filling", compare_deletion_blur, 1e-6),
    Row("`removal_curve`, insertion into skin", "`PixelFlipping`", "with picture and filling exchanged",
        compare_insertion_skin, 1e-6),
    Row("`curve_area`", "`PixelFlipping`", "divided by the steps, without the whole picture", compare_area, 1e-6),
    Row("`removal_curve`, in squares", "`RegionPerturbation`",
        "no: probability lost, square by square; follows from our curve of a map averaged over the squares",
        compare_regions, 1e-6),
    Row("`road_scores`, its fillings", "`noisy_linear_imputation`", "without noise", compare_imputed, 1e-6),
    Row("`road_scores`", "`ROAD`",
        "no: accuracy without the most important pixels; the same when hits stand for probabilities and it is asked "
        "for the least important too", compare_road, 1e-12),
    Row("`randomisation_table`", "`MPRT`", "with the same random weights, a layer at a time", compare_random_weights,
        1e-12),
    Row("`other_targets`", "`RandomLogit`", "with rank correlation, of two classes", compare_other_class, 1e-12),
    Row("`map_correlation`", "`correlation_spearman`", "yes", compare_correlation, 1e-12),
    Row("`map_similarity`", "`RandomLogit`",
        "no: its SSIM takes a map for one row of pixels (0.08 apart); the same with that of scikit-image",
        compare_similarity, 1e-9),
    Row("`max_sensitivity`", "`MaxSensitivity`", "with the same noise", compare_sensitivity, 1e-6),
]


def figures(row, case):
    ours, theirs = (np.asarray(values, np.float64) for values in row.compare(case))
    return ours, theirs


@pytest.mark.parametrize("row", ROWS, ids=[row.compare.__name__ for row in ROWS])
def test_the_same_figures(row, case, one_thread):
    ours, theirs = figures(row, case)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all() and np.ptp(theirs) > 0.1, "figures that are all alike show nothing"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=row.bound)


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_same_layers_in_the_same_order():
    "Of a backbone of the house, whose layers all have weights that no reset gives."
    model = create_model("resnet10t", num_classes=3, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 3
    before = deepcopy(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        theirs = [changed(copy, before) for _, copy in PyTorchModel(model).get_random_layer_generator("top_down")]
    ours = [changed(copy, before) for _, copy in randomised_copies(model, parts=len(theirs))]
    assert ours == theirs and 20 < len(ours) < len(ours[-1])


def print_table():
    "The table of the guide."
    case = make_case()
    print(f"| ours | Quantus {quantus.__version__} | the same? | largest difference |")
    print("|---|---|---|---|")
    for row in ROWS:
        ours, theirs = figures(row, case)
        largest = np.abs(ours - theirs).max()
        print(f"| {row.ours} | {row.theirs} | {row.same} | {f'{largest:.0e}' if largest else 0} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_table()
