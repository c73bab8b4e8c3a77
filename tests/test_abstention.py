"Risk, coverage and out-of-distribution scores, against brute force, planted truth and what the locks promise."
import json
from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.special import ndtr
from sklearn.covariance import ledoit_wolf

from skinlesion.evaluate.abstention import (
    FOREIGN,
    LockedAbstention,
    LockedOod,
    Mahalanobis,
    abstention_scorecard,
    crossfit_mahalanobis,
    energy,
    fit_mahalanobis,
    foreign_images,
    lock_abstention,
    lock_ood,
    ood_scorecard,
    risk_coverage,
)
from skinlesion.stats.intervals import expanded_level
from skinlesion.stats.resamples import Resamples


def orders(confidence):
    "Every order of the rows in which the confidence does not rise."
    return [p for p in permutations(range(len(confidence))) if (np.diff(confidence[list(p)]) <= 0).all()]


@pytest.mark.parametrize("seed", range(6))
def test_risks_against_every_order(seed):
    "Risk and AURC are means over all ways to break the ties."
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 3, 6).astype(float)
    correct = rng.integers(0, 2, 6).astype(bool)
    risks = np.array([np.cumsum(~correct[list(p)]) / np.arange(1, 7) for p in orders(confidence)])
    np.testing.assert_allclose(risk_coverage(confidence, correct, n_resamples=0).risk, risks.mean(0))
    card = abstention_scorecard(confidence, correct, n_resamples=0)
    assert card["aurc"]["value"] == pytest.approx(risks.mean())
    best = np.cumsum(np.sort(~correct)) / np.arange(1, 7)
    assert card["eaurc"]["value"] == pytest.approx(risks.mean() - best.mean())
    assert card["risk"]["value"] == pytest.approx((~correct).mean())


def test_intervals_against_a_loop():
    "The same resamples, one by one, on tables with rows repeated."
    rng = np.random.default_rng(1)
    lesions = np.arange(150) // 3
    confidence = rng.integers(0, 30, 150) / 30
    correct = rng.random(150) < .5 + confidence / 2
    weights = Resamples(lesions, 100, 0).weights[1:]
    curve = risk_coverage(confidence, correct, lesions, n_resamples=100, points=10)
    card = abstention_scorecard(confidence, correct, lesions, n_resamples=100)
    loop = [(np.repeat(confidence, w), np.repeat(correct, w)) for w in weights]
    shares = np.arange(1, 11) / 10
    risks = np.array(
        [np.interp(shares * len(c), range(len(c) + 1), _errors(c, r)) / (shares * len(c)) for c, r in loop]
    )
    ranked = np.argsort(-confidence, kind="stable")
    levels = [expanded_level(len({*lesions[ranked[:n]]})) for n in range(15, 151, 15)]
    limits = [np.quantile(own, [(1 - level) / 2, (1 + level) / 2]) for own, level in zip(risks.T, levels)]
    np.testing.assert_allclose(curve[["low", "high"]], limits)
    tails = (1 - expanded_level(50)) / 2, (1 + expanded_level(50)) / 2
    areas = [abstention_scorecard(c, r, n_resamples=0)["aurc"]["value"] for c, r in loop]
    np.testing.assert_allclose([card["aurc"]["low"], card["aurc"]["high"]], np.quantile(areas, tails))
    assert card["aurc"]["n"] == 150 and card["aurc"]["n_lesions"] == 50


def _errors(confidence, correct):
    "Errors to be expected among the first k of a table, k from 0."
    rising = 0 * confidence
    for c in np.unique(confidence):
        rising[confidence == c] = 1 - correct[confidence == c].mean()
    return np.r_[0, np.cumsum(rising[np.argsort(-confidence, kind="stable")])]


def held(seed):
    "Whether the intervals of a table hold the truth: uniform, calibrated confidence, images of a lesion alike."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 150)
    lesions = np.repeat(np.arange(150), sizes)
    confidence = np.repeat(rng.uniform(.5, 1, 150), sizes)
    correct = np.repeat(rng.random(150), sizes) < confidence
    card = abstention_scorecard(confidence, correct, lesions, n_resamples=200, seed=seed)
    return [
        card[name]["low"] <= truth <= card[name]["high"]
        for name, truth in dict(risk=1 / 4, aurc=1 / 8, risk_at_80_coverage=1 / 5).items()
    ]


def test_intervals_hold_the_truth():
    "Forty tables with repeated lesions."
    shares = np.mean([held(seed) for seed in range(40)], axis=0)
    assert (shares >= .85).all(), shares


@pytest.mark.slow
def test_intervals_hold_the_truth_at_length():
    "A thousand tables: 95 % is asked for."
    shares = np.mean([held(seed) for seed in range(1000)], axis=0)
    print("held by 95 % intervals (risk, aurc, risk at 80 % coverage):", shares)
    assert (shares >= .92).all(), shares


def test_abstained():
    "What a locked rule did, counted by hand."
    card = abstention_scorecard(
        [0.9, 0.8, 0.3, 0.2, 0.1],
        [1, 0, 1, 0, 0],
        ["a", "b", "c", "d", "d"],
        np.array([False, False, True, True, True]),
        50,
    )
    assert (card["answered"]["value"], card["answered"]["n"]) == (.4, 5)
    assert (card["answered_risk"]["value"], card["answered_risk"]["n"], card["answered_risk"]["n_lesions"]) == (
        0.5,
        2,
        2,
    )
    assert card["abstained_risk"]["value"] == pytest.approx(2/3) and card["abstained_risk"]["n_lesions"] == 2
    everyone = abstention_scorecard([.9, .8], [1, 0], abstained=np.array([True, True]), n_resamples=20)
    assert (
        everyone["answered_risk"]["value"] is None and everyone["answered_risk"]["reason"] == "no image was answered"
    )


@pytest.mark.parametrize("seed", range(20))
def test_locked_abstention_keeps_its_share(seed):
    "With ties and repeated lesions: at most the share, and one level higher would pass it."
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 12, 60) / 7
    lesions = rng.integers(0, 25, 60)
    share = rng.uniform(0, .6)
    rule = lock_abstention(confidence, lesions, share)
    def per_lesion(below):
        return np.mean([below[lesions == one].mean() for one in np.unique(lesions)])
    assert per_lesion(rule.abstains(confidence)) <= share + 1e-9
    assert rule.reached == pytest.approx(per_lesion(rule.abstains(confidence)), abs=1e-7)
    higher = confidence[confidence > rule.value + 1e-6]
    if len(higher):
        assert per_lesion(confidence < higher.min()) > share
    assert LockedAbstention.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_locked_ood_score_keeps_its_promise():
    "One more lesion with images of its own, over 1,500 draws: an image of it is flagged in at most 5 %."
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(1500):
        sizes = rng.integers(1, 4, 60)
        lesions = np.repeat(np.arange(60), sizes)
        scores = rng.normal(size=60)[lesions] + .5 * rng.normal(size=len(lesions))
        locked = lock_ood(scores[lesions < 59], lesions[lesions < 59])
        flagged.append(locked.flags(scores[lesions == 59]).mean())
    assert .03 < np.mean(flagged) < .065, np.mean(flagged)


@pytest.mark.parametrize("kind", [LockedAbstention, LockedOod])
def test_locks_are_strict(kind):
    "Each key is needed, and nothing beside them."
    values = (lock_abstention if kind is LockedAbstention else lock_ood)(np.arange(40.)).to_dict()
    for key in values:
        with pytest.raises(ValueError, match=f"the key '{key}' is missing"):
            kind.from_dict({k: v for k, v in values.items() if k != key})
        with pytest.raises(ValueError, match="finite|number"):
            kind.from_dict(values | {key: float("nan")})
        with pytest.raises(ValueError, match="number"):
            kind.from_dict(values | {key: "x"})
    with pytest.raises(ValueError, match="unknown key 'more'"):
        kind.from_dict(values | dict(more=1))


def test_energy():
    "As torch has it."
    import torch
    logits = np.random.default_rng(0).normal(0, 30, (50, 7))
    np.testing.assert_allclose(energy(logits, 2.), -2 * torch.logsumexp(torch.from_numpy(logits) / 2, 1).numpy())


def clouds(n=300, D=5, C=3, seed=0):
    "Classes of one covariance that is neither round nor upright."
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, C, n)
    mix = rng.normal(size=(D, D))
    return rng.normal(size=(n, D)) @ mix + 4 * rng.normal(size=(C, D))[targets], targets


def test_mahalanobis_against_scipy():
    "With every direction kept: the distance of scipy under scikit-learn's shrunk covariance."
    features, targets = clouds()
    fitted = fit_mahalanobis(features, targets, dims=5, normalise=False)
    steps = (features - features.mean(0)) / features.std(0)
    centres = np.stack([steps[targets == c].mean(0) for c in range(3)])
    inverse = np.linalg.inv(ledoit_wolf(steps - centres[targets], assume_centered=True)[0])
    expected = [min(mahalanobis(step, centre, inverse) for centre in centres) for step in steps]
    np.testing.assert_allclose(fitted.score(features), expected, rtol=1e-4)


def test_mahalanobis_outside_of_the_axes():
    "With two directions kept: the distance under one whole covariance, round in the directions left out."
    features, targets = clouds(D=8)
    fitted = fit_mahalanobis(features, targets, dims=2, normalise=False)
    steps = (features - features.mean(0)) / features.std(0)
    inner = fitted.axes.T @ fitted.whitener.T @ fitted.whitener @ fitted.axes
    inverse = inner + (np.eye(8) - fitted.axes.T @ fitted.axes) / fitted.rest
    centres = np.stack([fitted.axes.T @ fitted.axes @ steps[targets == c].mean(0) for c in range(3)])
    expected = [min(mahalanobis(step, centre, inverse) for centre in centres) for step in steps]
    np.testing.assert_allclose(fitted.score(features), expected, rtol=1e-4)
    outside = steps - steps @ fitted.axes.T @ fitted.axes
    assert fitted.rest == pytest.approx((outside**2).sum() / 300 / 6, rel=1e-5)


def test_mahalanobis_stored():
    "Plain JSON brings back the same scores; each key is needed; the numbers are as long as float32 has them."
    features, targets = clouds(D=40, n=400)
    fitted = fit_mahalanobis(features, targets)
    values = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    np.testing.assert_array_equal(Mahalanobis.from_dict(values).score(features), fitted.score(features))
    assert fitted.axes.shape == (32, 40) and all(float(f"{x:.7g}") == x for x in np.ravel(values["axes"]))
    for key in values:
        with pytest.raises(ValueError, match=f"the key '{key}' is missing"):
            Mahalanobis.from_dict({k: v for k, v in values.items() if k != key})
    for key in ("mean", "scale", "whitener", "centres"):
        with pytest.raises(ValueError, match="does not fit axes"):
            Mahalanobis.from_dict(values | {key: [[1.]]})
    np.testing.assert_allclose(
        np.concatenate([fitted.score(features[[i]]) for i in range(20)]), fitted.score(features[:20]), rtol=1e-10
    )


def test_mahalanobis_finds_what_is_planted():
    "A locked, cross-fitted threshold flags few new images of the classes, and most others."
    rng = np.random.default_rng(0)
    base = np.abs(rng.normal(size=(3, 200))) + 1
    mix = rng.normal(size=(200, 200)) / 12
    def make(n, shift=0.0):
        return (base + shift)[rng.integers(0, 3, n)] + rng.normal(size=(n, 200)) @ mix
    targets = rng.integers(0, 3, 400)
    known = base[targets] + rng.normal(size=(400, 200)) @ mix
    detector = fit_mahalanobis(known, targets)
    lesions = np.arange(400) // 2
    locked = lock_ood(crossfit_mahalanobis(known, targets, lesions), lesions)
    away = make(300) + rng.normal(size=(300, 200))
    card = ood_scorecard(detector.score(make(300)), dict(away=detector.score(away)), locked=locked, n_resamples=100)
    assert (
        card["inside"]["flagged"]["value"] < 0.08
        and card["away"]["flagged"]["value"] > 0.9
        and card["away"]["auroc"]["value"] > 0.95
    )
    fitted_on = lock_ood(detector.score(known), lesions).flags(detector.score(make(300))).mean()
    assert fitted_on > 2 * card["inside"]["flagged"]["value"] + .05  # what locking on the fitted images would have done


def test_ood_leaves():
    "AUROC and false positive rate of two normal clouds, against the formulas and against a naive count."
    rng = np.random.default_rng(3)
    inside = rng.normal(size=3000)
    outside = rng.normal(1.5, 1, 2000)
    leaves = ood_scorecard(inside, dict(a=outside), n_resamples=100)["a"]
    for name, truth in dict(auroc=ndtr(1.5 / 2**.5), fpr_at_95_tpr=ndtr(1.6449 - 1.5)).items():
        assert leaves[name]["value"] == pytest.approx(truth, abs=.03)
    assert leaves["fpr_at_95_tpr"]["value"] == (outside <= np.sort(inside)[int(np.ceil(.95 * 3000)) - 1]).mean()
    assert leaves["auroc"]["value"] == pytest.approx((outside[:, None] > inside).mean())
    assert leaves["auroc"]["n"] == 5000 and leaves["fpr_at_95_tpr"]["n"] == 2000


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("size", [16, 65])
def test_foreign_images(kind, size):
    "Any size, images that differ, the same again, and the first ones whatever the number."
    pictures = foreign_images(kind, 4, size)
    assert pictures.shape == (4, size, size, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(foreign_images(kind, 2, size), pictures[:2])
    assert len(np.unique(pictures.reshape(4, -1), axis=0)) == 4
