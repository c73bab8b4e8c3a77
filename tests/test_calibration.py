"Calibration: optima against other implementations, planted miscalibration, and what the choice must not do."
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from skinlesion.data.splits import group_folds
from skinlesion.evaluate.calibration import (
    CALIBRATIONS,
    PRIOR_WIDTHS,
    Calibrator,
    choose_calibration,
    choose_candidate,
    crossfit,
    fit_calibrator,
    image_log_losses,
)
from skinlesion.stats.intervals import expanded_level, wilson_interval
from skinlesion.stats.resamples import Resamples

LEARNING = CALIBRATIONS[1:]


def softmax(z):
    "Over the last axis."
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lesions(n, seed, num_classes=4, scale=1.):
    "A model whose log-probabilities are `scale` times the true ones; one to three similar images of each lesion."
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(n), rng.integers(1, 4, n))
    z = rng.normal(size=(n, num_classes)) * 1.5 + np.log(np.geomspace(8, 1, num_classes))
    targets = (rng.random(n)[:, None] > softmax(z).cumsum(1)).sum(1)
    return softmax(scale * (z[ids] + .05 * rng.normal(size=(len(ids), num_classes)))), targets[ids], ids


HARD_CASES = {
    "plain": lesions(200, 0)[:2],
    "zeros and ones": (np.eye(4)[np.r_[lesions(200, 0)[1][:-40], np.zeros(40, int)]], lesions(200, 0)[1]),
    "an absent class": (lesions(200, 1)[0], np.minimum(lesions(200, 1)[1], 2)),
    "four images": (lesions(4, 3)[0][:4], np.array([0, 1, 0, 1])),
    "all alike": (np.full((60, 4), .25), np.arange(60) % 3),
    "always right": (softmax(8 * np.eye(4)[np.arange(80) % 4]), np.arange(80) % 4),
    "always wrong": (softmax(8 * np.eye(4)[np.arange(80) % 4]), (np.arange(80) + 1) % 4),
    "from float32": (lesions(200, 4, scale=9)[0].astype(np.float32), lesions(200, 4)[1]),
}


@pytest.mark.parametrize("kind", CALIBRATIONS)
@pytest.mark.parametrize("name", HARD_CASES)
def test_every_map_gives_probabilities(kind, name):
    "Whatever it was fitted on, also for new images; a file gives the same bits back."
    probs, targets = HARD_CASES[name]
    fitted = fit_calibrator(kind, probs, targets)
    new = np.concatenate([np.asarray(probs, float), np.eye(4), np.full((1, 4), .25), lesions(30, 9, scale=20)[0]])
    calibrated = fitted(new)
    assert np.isfinite(calibrated).all() and (calibrated >= 0).all()
    assert np.allclose(calibrated.sum(1), 1, atol=1e-6)
    again = Calibrator.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted and again(new).tobytes() == calibrated.tobytes()
    assert np.concatenate([fitted(row[None]) for row in new]).tobytes() == calibrated.tobytes()


@pytest.mark.parametrize("kind", ["temperature", "vector", "dirichlet"])
@pytest.mark.parametrize("name", ["plain", "an absent class", "four images", "from float32"])
def test_order_of_rows_and_repeats_do_not_matter(kind, name):
    "The fit is of the images, not of their order."
    probs, targets = HARD_CASES[name]
    order = np.random.default_rng(0).permutation(len(targets))
    one, other = (fit_calibrator(kind, probs[o], targets[o]) for o in (np.arange(len(targets)), order))
    np.testing.assert_allclose(one(HARD_CASES["plain"][0]), other(HARD_CASES["plain"][0]), atol=1e-6)


def posterior(kind, probs, targets, beta):
    "The penalised loss written out another way, of weights (C,C) and biases (C,) in one vector."
    z = np.log(probs)
    C = probs.shape[1]

    def loss(theta):
        weight = theta[:-C].reshape(C, C) if kind == "dirichlet" else np.diag(theta[:-C])
        bias = theta[-C:]
        off = weight[~np.eye(C, dtype=bool)]
        prior = (
            (((weight.diagonal() - beta) / PRIOR_WIDTHS["diagonal"]) ** 2).sum()
            + ((off / PRIOR_WIDTHS["off_diagonal"]) ** 2).sum()
            + ((bias / PRIOR_WIDTHS["bias"]) ** 2).sum()
        )
        p = softmax(z @ weight.T + bias)
        return -np.log(p[np.arange(len(p)), targets]).sum() + prior / 2
    return loss


def parity():
    "Map, reference, largest difference of a probability on new lesions."
    (probs, targets, _), (new, _, _) = lesions(300, 0, scale=1.7), lesions(300, 1, scale=1.7)
    def loss(t):
        return log_loss(targets, softmax(np.log(probs) / t[0]), labels=range(4))
    found = minimize(loss, [1.], method="Nelder-Mead", options=dict(xatol=1e-10, fatol=1e-14)).x[0]
    yield "temperature", "Nelder-Mead on sklearn.metrics.log_loss", softmax(np.log(new) / found)
    beta = 1 / fit_calibrator("temperature", probs, targets).parameters["temperature"]
    for kind, start in (
        ("vector", np.r_[np.ones(4), np.zeros(4)]),
        ("dirichlet", np.r_[np.eye(4).ravel(), np.zeros(4)]),
    ):
        theta = minimize(
            posterior(kind, probs, targets, beta), start, method="BFGS", options=dict(gtol=1e-6, maxiter=2000)
        ).x
        weight = theta[:-4].reshape(4, 4) if kind == "dirichlet" else np.diag(theta[:-4])
        yield kind, "BFGS, numerical gradient, on the loss written out", softmax(np.log(new) @ weight.T + theta[-4:])
    shares = (np.bincount(targets, minlength=4) + 1) / (len(targets) + 4)
    curves = []
    for c in range(4):
        x = np.r_[0, probs[:, c], 1]
        y = np.r_[shares[c], targets == c, shares[c]]
        curves.append(IsotonicRegression(out_of_bounds="clip").fit(x, y).predict(new[:, c]))
    yield (
        "isotonic",
        "sklearn.isotonic, one image of prior at either end",
        np.stack(curves, 1) / np.sum(curves, 0)[:, None],
    )


def test_parity():
    "Each fit stands where another optimiser or library puts it."
    (probs, targets, _), (new, _, _) = lesions(300, 0, scale=1.7), lesions(300, 1, scale=1.7)
    for kind, reference, answers in parity():
        difference = np.abs(fit_calibrator(kind, probs, targets)(new) - answers).max()
        print(f"{kind:12} {reference:50} {difference:.1e}")
        assert difference < 2e-5, (kind, difference)


@pytest.mark.parametrize("kind", LEARNING)
def test_no_prediction_depends_on_its_own_lesion(kind):
    "Whatever the diagnosis of one lesion, its own cross-fitted rows stay as they are, and others move."
    probs, targets, ids = lesions(60, 6)
    folds = group_folds(targets, ids)
    own = ids == ids[0]
    answers = [
        crossfit(lambda v, y: fit_calibrator(kind, v, y), probs, t, folds)
        for t in (targets, np.where(own, (targets + 1) % 4, targets))
    ]
    assert answers[0][own].tobytes() == answers[1][own].tobytes()
    assert np.abs(answers[0] - answers[1]).max() > 0


def false_alarms(n, rivals=6):
    "In how many of `n` tables a rival that is as good as the baseline is called better or worse."
    alarms = 0
    for seed in range(n):
        _, targets, ids = lesions(150, seed)
        rng = np.random.default_rng(10_000 + seed)
        # The same probability for the truth on average, with errors of the same size for each.
        z = rng.normal(size=(rivals + 1, ids.max() + 1, 4))[:, ids] + 1.5 * np.eye(4)[targets]
        table = choose_candidate({str(k): softmax(v) for k, v in enumerate(z)}, targets, ids, n_resamples=400).table
        alarms += table["verdict"].isin(["better", "worse"]).any()
    return alarms


@pytest.mark.parametrize("n", [5, 12, 40, 300])
def test_few_lesions_have_to_be_clearer(n):
    "The interval of one rival by hand: symmetric, with a larger share of the resamples inside where lesions are few."
    probs, targets, ids = lesions(n, 1)
    table = choose_candidate(dict(a=probs, b=softmax(np.log(probs) / 1.5)), targets, ids, n_resamples=2000).table
    difference = image_log_losses(targets, softmax(np.log(probs) / 1.5)) - image_log_losses(targets, probs)
    weights = Resamples(ids, 2000, 0).weights[1:]
    away = np.abs(weights @ difference / weights.sum(1) - difference.mean())
    half = np.quantile(away, expanded_level(n))
    np.testing.assert_allclose(
        table.loc[1, ["low", "high"]].to_numpy(float), difference.mean() + half * np.array([-1, 1])
    )
    assert half > np.quantile(away, .95)


def left_alone(n):
    "In how many of `n` tables of 200 lesions a model that is calibrated gets none, or a temperature near 1."
    found = [choose_calibration(*lesions(200, seed), n_resamples=400).calibrator for seed in range(n)]
    return sum(c.kind in ("none", "temperature") and .6 < c.parameters.get("temperature", 1) < 1.6 for c in found)


def mended(n):
    "In how many of `n` tables of 200 lesions a model with doubled log-probabilities is given a temperature, and which."
    found = [choose_calibration(*lesions(200, seed, scale=2.), n_resamples=400).calibrator for seed in range(n)]
    return sum(c.kind == "temperature" for c in found), [
        c.parameters["temperature"] for c in found if c.kind == "temperature"
    ]


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_rivals_that_are_alike_are_seldom_told_apart(n):
    "The intervals hold for all rivals at once: at 95 %, about one table in twenty gives an alarm."
    alarms = false_alarms(n)
    low, high = wilson_interval(alarms / n, n, .99)
    print(f"\n{alarms} of {n} tables with an alarm among 6 equal rivals: {alarms / n:.3f} ({low:.3f}-{high:.3f}, 99 %)")
    assert low < .06


@pytest.mark.parametrize("n", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_what_is_calibrated_is_left_alone(n):
    "Five kinds to choose from, and no more than a temperature needed."
    kept = left_alone(n)
    low, high = wilson_interval(kept / n, n, .99)
    print(f"\n{kept} of {n} calibrated tables kept as they were: {kept / n:.3f} ({low:.3f}-{high:.3f}, 99 %)")
    assert kept >= .9 * n and high > .95


@pytest.mark.parametrize("n", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_planted_temperature_comes_back(n):
    "Logits twice too large: a temperature of two, by name and by size."
    count, temperatures = mended(n)
    print(
        f"\n{count} of {n} tables given a temperature, mean {np.mean(temperatures):.3f}, from "
        f"{min(temperatures):.2f} to {max(temperatures):.2f}"
    )
    assert count >= .8 * n and abs(np.mean(temperatures) - 2) < .15


def test_selection_speaks_for_itself():
    "The table is in the order given, holds every candidate, and the sentence names what was taken."
    probs, targets, ids = lesions(300, 0, scale=2.)
    selection = choose_calibration(probs, targets, ids).selection
    assert selection.table["candidate"].tolist() == list(CALIBRATIONS)
    assert selection.table["n"].eq(len(targets)).all() and selection.table["n_lesions"].eq(300).all()
    assert selection.name == "temperature"
    assert selection.reasons[0].startswith("temperature stays: of 4 rival(s) none has a clearly lower log loss")
    table = selection.table.set_index("candidate")
    assert table.verdict["temperature"] == "baseline" and table.verdict["none"] == "worse"
    assert 0 < table.low["none"] < table.difference["none"] < table.high["none"]
    np.testing.assert_allclose(selection.table["log_loss"][0], image_log_losses(targets, probs).mean())


def test_fitting_loads_nothing_heavy():
    "A prediction applies a calibrator, so the module must come light."
    code = (
        "import sys, skinlesion.evaluate.decisions, skinlesion.evaluate.net_benefit; "
        "print(*sorted({n.split('.')[0] for n in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sklearn", "matplotlib", "torch", "seaborn", "lightning"} & set(loaded)
