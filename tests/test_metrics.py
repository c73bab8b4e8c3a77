"Metrics and intervals against other implementations, their memory, where they are undefined, and interval coverage."
import importlib.util
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn import metrics as sk
from torchmetrics.functional import classification as tm

from skinlesion.stats.intervals import delong
from skinlesion.stats.metrics import BINARY, METRICS, PER_CLASS, WHOLE, malignancy_metrics, weighted_metrics
from skinlesion.stats.resamples import Resamples

C = 5
BAD = np.array([True, False, True, False, False])


# ---- the tables

def softmax(logits):
    "Rows that sum to one."
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def random_table(rng):
    "Every class about as common, no score twice."
    targets = rng.integers(0, C, 400)
    return targets, softmax(rng.normal(size=(400, C)) + 1.2 * np.eye(C)[targets])


def tied_table(rng):
    "Probabilities in sixteenths: many images share a score, and none lies on the edge of a bin."
    targets = rng.integers(0, C, 400)
    chances = softmax(1.5 * np.eye(C)[targets] + .3 * rng.normal(size=(400, C)))
    return targets, (1 + np.stack([rng.multinomial(16 - C, row) for row in chances])) / 16


def imbalanced_table(rng):
    "Nine in ten of one class, three images of the rarest, and a very confident model."
    targets = np.repeat(np.arange(C), (450, 30, 12, 5, 3))
    return targets, softmax(3 * rng.normal(size=(500, C)) + 5 * np.eye(C)[targets] + np.log([.9, .06, .02, .01, .01]))


TABLES = {"random": random_table, "tied": tied_table, "imbalanced": imbalanced_table}


# ---- the references

def by_sklearn(targets, probs):
    "The metrics of scikit-learn."
    predicted = probs.argmax(1)
    hot = np.eye(C)[targets]
    every = range(C)
    def rest(score):
        return np.array([score(targets != c, predicted != c) for c in every])
    return dict(
        accuracy=sk.accuracy_score(targets, predicted),
        balanced_accuracy=sk.balanced_accuracy_score(targets, predicted),
        auroc_macro=sk.roc_auc_score(targets, probs, multi_class="ovr", average="macro"),
        auroc_weighted=sk.roc_auc_score(targets, probs, multi_class="ovr", average="weighted"),
        average_precision_macro=sk.average_precision_score(hot, probs, average="macro"),
        average_precision_weighted=sk.average_precision_score(hot, probs, average="weighted"),
        f1_macro=sk.f1_score(targets, predicted, average="macro"),
        f1_weighted=sk.f1_score(targets, predicted, average="weighted"),
        mcc=sk.matthews_corrcoef(targets, predicted),
        kappa=sk.cohen_kappa_score(targets, predicted),
        log_loss=sk.log_loss(targets, probs),
        brier=sk.brier_score_loss(targets, probs),
        sensitivity=sk.recall_score(targets, predicted, average=None),
        specificity=rest(sk.recall_score),
        ppv=sk.precision_score(targets, predicted, average=None),
        npv=rest(sk.precision_score),
        f1=sk.f1_score(targets, predicted, average=None),
        auroc=sk.roc_auc_score(hot, probs, average=None),
        average_precision=sk.average_precision_score(hot, probs, average=None),
        class_brier=np.array([sk.brier_score_loss(targets == c, probs[:, c]) for c in every]),
    )


def top2_by_sklearn(targets, probs):
    "scikit-learn breaks ties the other way, so the classes are reversed."
    return dict(top2_accuracy=sk.top_k_accuracy_score(C - 1 - targets, probs[:, ::-1], k=2, labels=np.arange(C)))


def by_torchmetrics(targets, probs):
    "The metrics of torchmetrics; it counts in single precision."
    t = torch.tensor(targets)
    p = torch.tensor(probs)
    classes = np.array(
        [float(tm.binary_calibration_error(p[:, c], (t == c).int(), n_bins=15, norm="l1")) for c in range(C)]
    )
    return dict(
        ece=float(tm.multiclass_calibration_error(p, t, C, n_bins=15, norm="l1")),
        mce=float(tm.multiclass_calibration_error(p, t, C, n_bins=15, norm="max")),
        class_ece=classes,
        ece_classwise=classes.mean(),
    )


def by_loops(targets, probs, lesions):
    "Calibration errors that neither has, written as loops."
    right = probs.argmax(1) == targets
    sure = probs.max(1)
    order = np.lexsort((right, sure))
    edges = [np.sort(sure)[int(np.ceil(len(sure) * b / 15)) - 1] for b in range(1, 15)]
    total = 0
    for low, high in zip([-1, *edges], [*edges, 2]):  # (low, high]; a bin is empty where ties span it
        inside = (sure[order] > low) & (sure[order] <= high)
        total += abs((right[order] * 1. - sure[order])[inside].sum()) / len(sure)
    bins = np.minimum((sure * 15).astype(int), 14)
    pairs = 0
    mass = 0
    for b in range(15):
        gap = (right - sure)[bins == b]
        own = lesions[bins == b]
        apart = own[:, None] != own[None]
        if apart.any():
            pairs += len(gap) * (np.outer(gap, gap) * apart).sum() / apart.sum()
            mass += len(gap)
    return dict(ece_adaptive=total, ece_debiased=np.sqrt(max(0, pairs / mass)))


def binary_by_sklearn(bad, score):
    "Malignancy by scikit-learn."
    called = score >= .5
    return dict(
        auroc=sk.roc_auc_score(bad, score),
        average_precision=sk.average_precision_score(bad, score),
        sensitivity=sk.recall_score(bad, called),
        specificity=sk.recall_score(~bad, ~called),
        ppv=sk.precision_score(bad, called),
        npv=sk.precision_score(~bad, ~called),
        f1=sk.f1_score(bad, called),
        mcc=sk.matthews_corrcoef(bad, called),
        brier=sk.brier_score_loss(bad, score),
        log_loss=sk.log_loss(bad, score),
    )


def binary_by_torchmetrics(bad, score):
    "Malignancy by torchmetrics."
    s = torch.tensor(score)
    b = torch.tensor(bad).int()
    pairs = {"sensitivity_at_{}_specificity": tm.binary_sensitivity_at_specificity,
             "specificity_at_{}_sensitivity": tm.binary_specificity_at_sensitivity}
    rates = {
        name.format(level): float(rate(s, b, level / 100)[0]) for name, rate in pairs.items() for level in (90, 95)
    }
    return rates | dict(ece=float(tm.binary_calibration_error(s, b, n_bins=15, norm="l1")))


def by_isic2019(bad, score):
    "The older scorer: the area under the curve, by straight lines, from where it reaches 80 % sensitivity."
    fpr, tpr, _ = sk.roc_curve(bad, score, drop_intermediate=False)
    reached = int(np.argmax(tpr > .8 - 1e-12))
    (f0, f1), (t0, t1) = fpr[reached - 1:reached + 1], tpr[reached - 1:reached + 1]
    corner = f0 + (.8 - t0) / (t1 - t0) * (f1 - f0)
    return dict(pauc80_isic2019=np.trapezoid([.8, *tpr[reached:]], [corner, *fpr[reached:]]))


def by_isic2024(bad, score):
    "The later one: scikit-learn's standardised partial area of the inverted problem, with the standardising undone."
    scaled = sk.roc_auc_score(~bad, -score, max_fpr=.2)
    least = .2**2 / 2
    return dict(pauc80_isic2024=least + (.2 - least) * (scaled - .5) / .5)


def references(targets, probs, lesions):
    "Reference -> metric -> value, of all classes and of malignancy."
    bad = BAD[targets]
    score = probs[:, BAD].sum(1)
    multiclass = {
        "scikit-learn": by_sklearn(targets, probs),
        "scikit-learn, classes reversed": top2_by_sklearn(targets, probs),
        "torchmetrics": by_torchmetrics(targets, probs),
        "loop over pairs or bins": by_loops(targets, probs, lesions),
    }
    binary = {"scikit-learn": binary_by_sklearn(bad, score), "torchmetrics": binary_by_torchmetrics(bad, score),
              "ISIC 2019 scorer": by_isic2019(bad, score), "ISIC 2024 formula": by_isic2024(bad, score)}
    return multiclass, binary


def differences(rng):
    "Rows of (metric, reference, table, largest difference) over tables and two resamples of each."
    for title, make in TABLES.items():
        targets, probs = make(rng)
        lesions = rng.permutation(len(targets)) // 2
        weights = Resamples(lesions, 40, seed=1).weights
        complete = [np.bincount(np.repeat(targets, w), minlength=C).min() > 0 for w in weights]  # no class is lost
        weights = weights[complete][:3]
        whole = weighted_metrics(targets, probs, weights, lesion_ids=lesions)
        binary = malignancy_metrics(BAD[targets], probs[:, BAD].sum(1), weights)
        for r, weight in enumerate(weights):
            rows = np.repeat(np.arange(len(targets)), weight)
            for kind, ours, theirs in zip(
                ("", "malignant "), (whole, binary), references(targets[rows], probs[rows], lesions[rows])
            ):
                for source, values in theirs.items():
                    for name, value in values.items():
                        yield kind + name, source, title, np.abs(ours[name][r] - value).max()


@pytest.fixture(scope="module")
def parity():
    "Largest difference of each metric to its reference on each table."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics where no threshold keeps the specificity
        rows = list(differences(np.random.default_rng(0)))
    table = pd.DataFrame(rows, columns=["metric", "reference", "table", "difference"])
    return table.pivot_table(
        index=["metric", "reference"], columns="table", values="difference", aggfunc="max", sort=False
    )


def test_every_metric_agrees_with_its_reference(parity):
    with pd.option_context("display.max_rows", None, "display.float_format", "{:.0e}".format):
        print("\n" + parity.to_string())
    exact = ~parity.index.get_level_values("reference").str.startswith("torchmetrics")
    assert parity[exact].max().max() < 1e-9, parity[exact].max(axis=1).sort_values().tail(3)
    assert parity[~exact].max().max() < 2e-6, parity[~exact].max(axis=1).sort_values().tail(3)  # single precision


def test_no_metric_is_without_a_reference(parity):
    measured = {*parity.index.get_level_values("metric")}
    assert measured == {*WHOLE, *PER_CLASS.values(), *(f"malignant {name}" for name in BINARY)}
    assert {*WHOLE, *PER_CLASS.values(), *BINARY} <= {*METRICS}


# ---- shape, memory, the undefined

def test_shapes_and_ranges():
    targets, probs = random_table(np.random.default_rng(1))
    for name, values in weighted_metrics(targets, probs, Resamples(np.arange(400), 6).weights).items():
        assert values.shape == ((7, C) if name in PER_CLASS.values() else (7,)) and values.dtype == np.float64
        low = METRICS[name].low
        high = METRICS[name].high
        assert (low is None or values.min() >= low) and (high is None or values.max() <= high), name
    for name, values in malignancy_metrics(
        BAD[targets], probs[:, BAD].sum(1), Resamples(np.arange(400), 6).weights
    ).items():
        metric = METRICS[name]
        assert (
            values.shape == (7,) and metric.low <= values.min() and (metric.high is None or values.max() <= metric.high)
        ), name


def test_ends_of_the_ranges():
    "A perfect and a completely wrong table reach the ends that `METRICS` names."
    targets = np.arange(2 * C) % C
    best, worst = (weighted_metrics(targets, np.eye(C)[(targets + shift) % C]) for shift in (0, 1))
    for name, metric in METRICS.items():
        if name not in best:
            continue
        assert np.allclose(best[name], metric.high if metric.better == "higher" else metric.low), name
        if name in ("accuracy", "sensitivity", "f1_macro", "brier", "ece", "ece_debiased", "mce"):
            assert np.allclose(worst[name], metric.low if metric.better == "higher" else metric.high), name
    bad = np.array([True, True, False, False])
    score = np.array([.9, .8, .2, .1])
    assert malignancy_metrics(bad, score)["pauc80_isic2019"] == 1 and np.isclose(
        malignancy_metrics(bad, score)["pauc80_isic2024"], 0.2
    )
    assert malignancy_metrics(bad, 1 - score)["pauc80_isic2024"] == 0


def test_memory_does_not_grow_with_resamples():
    targets, probs = random_table(np.random.default_rng(2))
    rows = np.tile(np.arange(400), 10)
    peaks = []
    for n in (100, 800):
        weights = Resamples(np.arange(4000) // 2, n).weights
        tracemalloc.start()
        weighted_metrics(targets[rows], probs[rows], weights, lesion_ids=np.arange(4000) // 2)
        malignancy_metrics(BAD[targets[rows]], probs[rows][:, BAD].sum(1), weights)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 40, peaks  # MiB; as float64 the weights alone would be 24


@pytest.mark.parametrize("targets, defined", [
    ([0, 0, 0, 0], {"accuracy", "top2_accuracy", "f1_weighted", "log_loss", "brier", "ece", "ece_adaptive",
                    "ece_debiased", "ece_classwise", "mce"}),
    ([0, 0, 1, 1], {*WHOLE} - {"balanced_accuracy", "auroc_macro", "average_precision_macro", "f1_macro"})])
def test_an_absent_class_leaves_undefined_what_needs_it(targets, defined):
    probs = np.array([[.5, .3, .2], [.2, .5, .3], [.1, .6, .3], [.6, .3, .1]])
    metrics = weighted_metrics(np.array(targets), probs)
    assert {name for name in WHOLE if not np.isnan(metrics[name][0])} == defined
    assert (
        np.isnan(metrics["sensitivity"][0, 2]) and np.isnan(metrics["auroc"][0, 2]) and np.isnan(metrics["ppv"][0, 2])
    )
    assert metrics["specificity"][0, 2] == 1 and not np.isnan(metrics["class_brier"][0, 2])


def test_a_resample_without_a_class_is_undefined_alone():
    targets, probs = imbalanced_table(np.random.default_rng(3))
    weights = Resamples(np.arange(500), 300).weights[1:]
    lost = weights[:, targets == 4].sum(1) == 0
    macro = weighted_metrics(targets, probs, weights, names=("auroc_macro", "auroc_weighted"))
    assert (
        0 < lost.sum() < 60
        and (np.isnan(macro["auroc_macro"]) == lost).all()
        and not np.isnan(macro["auroc_weighted"]).any()
    )


# ---- DeLong

def delong_by_loops(positive, scores, lesions):
    "Difference of two AUROCs and its standard error, lesion by lesion, as Obuchowski 1997 writes them."
    def kernel(score):
        return np.array([[float(p > n) + .5 * (p == n) for n in score[~positive]] for p in score[positive]])
    gap = kernel(scores[0]) - kernel(scores[1])
    won = gap.mean(1)
    beaten = gap.mean(0)
    theta = gap.mean()
    own = lesions[positive]
    other = lesions[~positive]
    every = np.unique(lesions)
    ten = np.array([(won[own == c] - theta).sum() for c in every])
    one = np.array([(beaten[other == c] - theta).sum() for c in every])
    m = len(won)
    n = len(beaten)
    k10 = len(np.unique(own))
    k01 = len(np.unique(other))
    k = len(every)
    s10 = k10 / ((k10 - 1) * m) * (ten**2).sum()
    s01 = k01 / ((k01 - 1) * n) * (one**2).sum()
    return theta, np.sqrt(s10 / m + s01 / n + 2 * k / (k - 1) * (ten * one).sum() / (m * n))


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("digits", [1, 9])
def test_delong_agrees_with_its_paper(repeat, digits):
    "With lesions of one class and lesions whose images differ in class (units may be patients), ties or none."
    rng = np.random.default_rng(digits)
    positive = rng.random(90) < .4
    lesions = rng.permutation(90) // repeat
    core = positive + rng.normal(size=90)
    a, b = ((core + s * rng.normal(size=90)).round(digits) for s in (.5, 1.))
    leaf, (gap, error) = delong(positive, a, b, lesions), delong_by_loops(positive, (a, b), lesions)
    half = 1.959963984540054 * error
    print(f"DeLong, {repeat} image(s) each, {digits} digits: largest difference "
          f"{max(abs(leaf['value'] - gap), abs(leaf['low'] - gap + half), abs(leaf['high'] - gap - half)):.0e}")
    assert np.allclose([leaf["value"], leaf["low"], leaf["high"]], [gap, gap - half, gap + half], rtol=0, atol=1e-12)
    assert np.isclose(leaf["p"], 2 * norm.sf(abs(gap) / error)) and ("Obuchowski" in leaf["method"]) == (repeat > 1)


# ---- how often an interval holds the truth

@pytest.fixture(scope="module")
def coverage():
    "The benchmark of that name."
    path = Path(__file__).parents[1] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("interval_coverage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.coverage


UNBIASED = ["accuracy", "sensitivity", "auroc", "auroc, DeLong", "brier", "ece_debiased"]


def test_intervals_hold_the_truth_in_forty_tables(coverage):
    table = coverage(tables=40, n_lesions=150, n_resamples=300, draws=100_000).set_index("metric")
    print("\n" + table.round(3).to_string())
    # 33 of 40: fewer has a chance of one in 200 where 95 % hold it
    assert (table.holds[UNBIASED] >= 0.825).all(), table.holds
    assert table.no_interval.sum() == 0


@pytest.mark.slow
def test_intervals_hold_the_truth_in_a_thousand_tables(coverage):
    table = coverage(tables=1000, n_lesions=300, n_resamples=1000).set_index("metric")
    print("\n" + table.round(4).to_string())
    assert (table.high[UNBIASED] >= .93).all(), table.holds
    assert table.bias.ece > table.two_se.ece and abs(table.bias.accuracy) < 2 * table.two_se.accuracy
    calibrated = coverage(tables=300, n_lesions=300, n_resamples=300, sharpness=1.).set_index("metric")
    print(calibrated.round(4).to_string())
    assert calibrated["mean"].ece > 5 * calibrated.truth.ece and calibrated.bias.ece > 2 * calibrated.bias.ece_debiased
    assert calibrated.low.ece_debiased > .93 and calibrated.holds["ece, unshifted"] < .2 < .7 < calibrated.holds.ece


def test_stratified_resamples_keep_every_class():
    targets, _ = imbalanced_table(np.random.default_rng(4))
    lesions = np.arange(500) // 2
    weights = Resamples(lesions, 50, strata=targets).weights
    first = targets[np.arange(0, 500, 2)]
    for c in range(C):
        assert (weights[:, ::2][:, first == c].sum(1) == (first == c).sum()).all()
