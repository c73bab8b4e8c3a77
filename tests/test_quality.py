"""The quality gate on real pictures: what it lets pass and what it refuses."""
import zipfile
from dataclasses import astuple

import cv2
import numpy as np
import pytest

from madeup import ROOT
from shares import report
from skinlesion.audit.quality import measure_quality, quality_fault
from skinlesion.images import read_image

DATA = ROOT.parent / "shared" / "data"
ARCHIVES = [
    *(DATA / "ham10000" / f"HAM10000_images_part_{part}.zip" for part in (1, 2)),
    DATA / "isic2020" / "ISIC_2020_Training_JPEG.zip",
]


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.stem)
def pictures(request):
    "About fifty pictures of an archive."
    if not request.param.exists():
        pytest.skip(f"{request.param} is absent")
    with zipfile.ZipFile(request.param) as z:
        names = sorted(name for name in z.namelist() if name.endswith(".jpg"))
        return [read_image(z.read(name), name) for name in names[::max(1, len(names) // 50)]]


def refused(words, images, fault=""):
    "How many pictures are refused, for any reason or for this one."
    faults = [quality_fault(image) for image in images]
    hits = sum(bool(f) and fault in f for f in faults)
    report(words, hits, len(faults))
    return hits


def test_real_pictures_pass(pictures):
    "Of all 7,179 twelve are refused; among these few at most two."
    assert refused("real", pictures) <= 2


def test_blurred_pictures_are_refused(pictures):
    "From 2 % of the longer side on, whatever noise comes after it."
    rng = np.random.default_rng(0)
    for share in (.02, .08):
        blurred = [cv2.GaussianBlur(i, (0, 0), share * max(i.shape)) for i in pictures]
        noisy = [cv2.add(i, np.uint8(rng.integers(0, 7, i.shape))) for i in blurred]
        assert refused(f"blurred by {share}", blurred) == len(blurred)
        assert refused(f"blurred by {share}, noisy", noisy) == len(noisy)


def test_wrong_light_and_size_are_refused(pictures):
    "The reason names what is wrong."
    n = len(pictures)
    assert refused("values times .15", [i // 7 for i in pictures], "too dark") == n
    assert refused("times 3", [cv2.convertScaleAbs(i, alpha=3) for i in pictures], "overexposed") > .7 * n
    assert refused("shrunk", [cv2.resize(i, (48, 48)) for i in pictures], "too small") == n
    greys = [cv2.cvtColor(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for i in pictures]
    assert refused("grey", greys, "no colour") > .95 * n


def test_a_large_picture_is_judged_as_a_small_one(pictures):
    "Three times the pixels, the same verdict."
    large = [cv2.resize(i, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC) for i in pictures]
    assert [bool(quality_fault(i)) for i in large] == [bool(quality_fault(i)) for i in pictures]


def test_any_array_gets_a_verdict():
    "Random sizes and contents, mirrored views among them: a text, and no number that is not finite."
    rng = np.random.default_rng(1)
    for _ in range(100):
        height, width = rng.integers(1, 90, 2)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        image[: height // 2] = rng.integers(0, 256)
        turned = image[::-1, ::-1]
        measured = measure_quality(turned)
        assert np.isfinite(astuple(measured)).all(), measured
        assert quality_fault(measured) == quality_fault(turned)
