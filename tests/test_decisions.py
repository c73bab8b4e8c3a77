"Decisions: promises kept on average, costs that cannot be beaten, and curves against a reference written out."
import json

import numpy as np
import pandas as pd
import pytest

from skinlesion.evaluate.decisions import (
    CONFORMAL,
    DECISIONS,
    NONCONFORMITY,
    ConformalSets,
    LockedThreshold,
    conformal_quantile,
    conformal_scorecard,
    cost_decisions,
    cost_matrix,
    cost_scorecard,
    fit_conformal,
    image_costs,
    lesions_to_cover,
    lock_threshold,
    read_costs,
    threshold_scorecard,
)
from skinlesion.evaluate.net_benefit import cost_threshold, decision_curve, net_benefit_samples
from skinlesion.stats.intervals import expanded_level, wilson_interval
from skinlesion.stats.metrics import malignancy_masks, malignancy_metrics
from skinlesion.stats.resamples import Resamples
from skinlesion.taxonomy import LABEL_SETS

HAM = LABEL_SETS["ham10000"]


def softmax(z):
    "Over the last axis."
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lesions(n, seed, prior=(6, 3, 1), hard=True):
    "Probabilities that are wrong in scale, diagnoses, lesions; where `hard`, a lesion of six images is a hard one."
    rng = np.random.default_rng(seed)
    often = rng.random(n) < .3
    ids = np.repeat(np.arange(n), np.where(often, 6, 1))
    targets = rng.choice(3, n, p=np.array(prior) / sum(prior))
    skill = np.where(often & hard, .3, 2.5)
    z = (np.eye(3)[targets] * skill[:, None] + rng.normal(size=(n, 3)))[ids] + .3 * rng.normal(size=(len(ids), 3))
    return softmax(1.5 * z), targets[ids], ids


def one_of_each(table, seed=0):
    "An image of each lesion, drawn at random: a promise is about a new lesion."
    order = np.random.default_rng(seed).permutation(len(table[2]))
    rows = order[np.unique(table[2][order], return_index=True)[1]]
    return tuple(part[rows] for part in table)


def scores(n, seed, share=.2):
    "Malignancy, its probability, lesions with one to three images."
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(n), rng.integers(1, 4, n))
    malignant = rng.random(n) < share
    z = (1.5 * malignant - .8 + rng.normal(size=n))[ids] + .5 * rng.normal(size=len(ids))
    return malignant[ids], 1 / (1 + np.exp(-z)), ids


def ends(samples, n_lesions):
    "Of the 95 % percentile interval over resamples, expanded for so few lesions."
    return np.quantile(samples, [(1 + sign * expanded_level(n_lesions)) / 2 for sign in (-1, 1)])


def coverages(kind, score, n, size=40, coverage=.85):
    "Coverage of all and of each class, (tables, 1 + classes), on many lesions, of sets locked on `n` tables of `size`."
    fresh = one_of_each(lesions(20_000, 10**6))
    found = np.empty((n, 4))
    for k in range(n):
        sets = fit_conformal(kind, *lesions(size, k), coverage=coverage, score=score)
        hit = sets.sets(fresh[0])[np.arange(len(fresh[1])), fresh[1]]
        found[k] = hit.mean(), *(hit[fresh[1] == c].mean() for c in range(3))
    return found


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("score", NONCONFORMITY)
@pytest.mark.parametrize("kind", CONFORMAL)
def test_sets_cover_as_often_as_promised(kind, score, n):
    "On average over validation tables, for a new lesion: at least the promise, and without ties hardly more."
    found = coverages(kind, score, n)
    means = found.mean(0)
    errors = found.std(0) / np.sqrt(n)
    print(f"\n{kind} {score}, promised 0.85: " + ", ".join(f"{m:.3f} (+-{2 * e:.3f})" for m, e in zip(means, errors)))
    promised = range(4) if kind == "class_conditional" else range(1)
    assert all(means[c] > .85 - 3 * errors[c] for c in promised)
    if kind == "split" and score == "lac":
        assert means[0] < .85 + 1 / 41 + 3 * errors[0]


def test_votes_by_image_would_break_the_promise():
    "Where lesions of many images are the hard ones, a quantile over images is one of another mixture of lesions."
    fresh = one_of_each(lesions(20_000, 10**6))
    by_image = []
    by_lesion = []
    own = 1 - fresh[0][np.arange(len(fresh[1])), fresh[1]]
    for k in range(100):
        probs, targets, ids = lesions(200, k)
        scores = 1 - probs[np.arange(len(targets)), targets]
        by_image.append((own <= conformal_quantile(scores, np.arange(len(ids)), .85)).mean())
        by_lesion.append((own <= conformal_quantile(scores, ids, .85)).mean())
    assert abs(np.mean(by_lesion) - .85) < .015 < .04 < np.mean(by_image) - .85


def test_quantile_is_the_ordinary_one_where_each_lesion_counts_once():
    "Then it is the ceil((n + 1) * coverage)th smallest score of split conformal prediction."
    rng = np.random.default_rng(0)
    for n in (9, 10, 99, 500):
        own = rng.random(n)
        for coverage in (.5, .9, .95):
            k = int(np.ceil((n + 1) * coverage - 1e-9))
            expected = np.sort(own)[k - 1] if k <= n else 1.
            assert (k > n) == (n < lesions_to_cover(coverage))
            np.testing.assert_allclose(conformal_quantile(own, np.arange(n), coverage), expected, atol=1e-8)


def test_what_is_locked_survives_a_file():
    "Threshold and sets, through JSON, decide as before."
    probs, targets, ids = lesions(120, 0)
    threshold = lock_threshold(targets == 2, probs[:, 2], ids)
    again = LockedThreshold.from_dict(json.loads(json.dumps(threshold.to_dict())))
    assert again == threshold and (again.flags(probs[:, 2]) == threshold.flags(probs[:, 2])).all()
    for kind in CONFORMAL:
        for score in NONCONFORMITY:
            sets = fit_conformal(kind, probs, targets, ids, score=score)
            assert ConformalSets.from_dict(json.loads(json.dumps(sets.to_dict()))) == sets
            # Rounded to the eight digits of a predictions table, a probability stays on its side but for ties with the
            # quantile.
            rounded = np.array([[float(f"{p:.8g}") for p in row] for row in probs])
            assert (sets.sets(rounded) == sets.sets(probs)).mean() > .999


def reached(n, lesions_each=100, target=.95):
    "Sensitivities on many lesions of thresholds locked on `n` tables."
    malignant, score, _ = scores(100_000, 10**6)
    return np.array(
        [
            (score[malignant] >= lock_threshold(*scores(lesions_each, k), target, n_resamples=0).value).mean()
            for k in range(n)
        ]
    )


def test_about_half_of_the_thresholds_fall_short():
    "As the page says, and by the more the fewer lesions they were locked on."
    few = reached(200)
    many = reached(200, 1000)
    print(
        f"\nlocked on 100 lesions: {(few < 0.95).mean():.2f} fall short, one in twenty below "
        f"{np.quantile(few, 0.05):.3f}; "
        f"on 1000: {(many < 0.95).mean():.2f}, below {np.quantile(many, 0.05):.3f}"
    )
    assert .4 < (few < .95).mean() < .7 and .4 < (many < .95).mean() < .6
    assert np.quantile(few, .05) < np.quantile(many, .05) - .05


def test_threshold_scorecard_is_that_of_the_metrics():
    "The same shares by another way, on the data and in the same resamples."
    malignant, score, ids = scores(150, 0)
    card = threshold_scorecard(.4, malignant, score, ids, 300, 5)
    weights = Resamples(ids, 300, 5).weights
    for name, counted in (("sensitivity", malignant), ("specificity", ~malignant)):
        samples = malignancy_metrics(malignant, score, weights, threshold=.4)[name]
        expected = [samples[0], *ends(samples[1:], len(np.unique(ids[counted])))]
        np.testing.assert_allclose([card[name][k] for k in ("value", "low", "high")], expected)


def test_a_mean_has_the_interval_of_its_lesions():
    "How often the interval of a share holds the truth, over 150 tables of lesions whose images agree."
    held = 0
    for seed in range(150):
        malignant, _, ids = scores(200, seed, .3)
        leaf = Resamples(ids, 300).mean(malignant)
        held += leaf["low"] <= .3 <= leaf["high"]
    assert wilson_interval(held / 150, 150, .99)[1] > .95 and held / 150 > .88


def test_no_rule_is_cheaper_than_the_cheapest_decision():
    "Of true probabilities, in expectation, for any costs."
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.random((4, 4)) * (1 - np.eye(4)) * 10
        probs = softmax(rng.normal(size=(500, 4)) * 2)
        expected = probs @ costs
        decisions = cost_decisions(probs, costs)
        np.testing.assert_allclose(expected[np.arange(500), decisions], expected.min(1), atol=1e-8)
        assert expected[np.arange(500), cost_decisions(probs, costs, "argmax")].mean() >= expected.min(1).mean()


def test_cheapest_decision_flags_from_the_threshold_of_its_costs():
    "By malignancy alone it is malignant exactly where the malignancy probability passes alarm / (alarm + missed)."
    probs = softmax(np.random.default_rng(0).normal(size=(2000, 7)) * 2)
    malignant, _ = malignancy_masks(HAM)
    decisions = cost_decisions(probs, cost_matrix(HAM, missed=10, alarm=1))
    assert (malignant[decisions] == (probs[:, malignant].sum(1) > cost_threshold(10, 1))).all()
    # Net benefit there and cost are one thing in two units: cost = alarm and miss, against treating no one.
    truth = (np.random.default_rng(1).random(2000)[:, None] > probs.cumsum(1)).sum(1)
    paid = image_costs(truth, probs, cost_matrix(HAM), "cheapest").mean()
    benefit = net_benefit_samples(malignant[truth], probs[:, malignant].sum(1).clip(max=1), [cost_threshold(10)])[0, 0]
    np.testing.assert_allclose(paid, 10 * malignant[truth].mean() - 10 * benefit)


def test_costs_in_resamples_are_those_of_the_scorecard():
    "One value in two ways, and its interval."
    probs, targets, ids = lesions(100, 0)
    costs = 1 - np.eye(3)
    card = cost_scorecard(targets, probs, costs, ids, 200, 3)
    weights = Resamples(ids, 200, 3).weights[1:]
    for decide in DECISIONS:
        samples = weights @ image_costs(targets, probs, costs, decide) / weights.sum(1)
        np.testing.assert_allclose([card[decide][k] for k in ("low", "high")], ends(samples, 100))


def test_a_cost_that_did_not_occur_is_no_share_of_none():
    "Where no image cost anything, or each set holds one class, there is no interval: costs and sizes are no shares."
    probs = np.array([[.99, .01], [.2, .8]]).repeat(10, axis=0)
    ids = np.arange(20)
    targets = probs.argmax(1)
    card = cost_scorecard(targets, probs, cost_matrix(LABEL_SETS["melanoma"]), ids, 50)
    sets = conformal_scorecard(np.eye(2, dtype=bool)[targets], targets, ("benign", "mel"), ids, 50)
    for leaf, value in ((card["argmax"], 0), (card["saved"], 0), (sets["mean_set_size"], 1)):
        assert (leaf["value"], leaf["low"], leaf["high"]) == (value, None, None)
        assert leaf["reason"].startswith("no interval: every resample gives the same value")
    low, high = wilson_interval(1, 20)
    assert (sets["coverage"]["low"], sets["coverage"]["high"]) == (low, high) and "Wilson" in sets["singleton"][
        "method"
    ]


@pytest.mark.parametrize("text, problem", [
    ("truth,benign,mel\nbenign,0,1\nmel,10,0\nmel,10,0\n", "class 'mel' has 2 rows"),
    ("truth,benign\nbenign,0\nmel,10\n", "class 'mel' has 0 columns"),
    ("truth;benign;mel\nbenign;0;1\nmel;10;0\n", "is not in label set melanoma"),
    ("truth,benign,mel\nbenign,0,inf\nmel,10,0\n", "inf is no cost"),
    ("truth,benign,mel\nbenign,0,\nmel,10,0\n", "row 2, column mel: '' is no number"),
])
def test_bad_costs_are_refused_by_place(tmp_path, text, problem):
    "Whatever is wrong with the file."
    (tmp_path / "costs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="costs.csv") as error:
        read_costs(tmp_path / "costs.csv", LABEL_SETS["melanoma"])
    assert problem in str(error.value)


def test_costs_of_a_spreadsheet_are_read(tmp_path):
    "With a byte order mark, full names and the set's own order restored."
    codes = list(reversed(HAM.codes))
    expected = cost_matrix(HAM, 7, 2)
    table = pd.DataFrame(expected[::-1, ::-1], index=[HAM.names[c].replace("_", " ") for c in codes], columns=codes)
    table.to_csv(tmp_path / "costs.csv", encoding="utf-8-sig", index_label="")
    np.testing.assert_array_equal(read_costs(tmp_path / "costs.csv", HAM), expected)


def test_conformal_scorecard_counts_by_hand():
    "Against loops over images and lesions."
    probs, targets, ids = lesions(80, 2)
    sets = fit_conformal("split", *lesions(80, 3)).sets(probs)
    card = conformal_scorecard(sets, targets, ("a", "b", "c"), ids, 50)
    hits = [bool(sets[i, targets[i]]) for i in range(len(ids))]
    assert card["coverage"]["value"] == pytest.approx(np.mean(hits))
    each = [np.mean([h for h, own in zip(hits, ids) if own == k]) for k in range(80)]
    assert card["lesion_coverage"]["value"] == pytest.approx(np.mean(each))
    assert card["mean_set_size"]["value"] == pytest.approx(np.mean([sum(row) for row in sets]))
    assert card["per_class"]["c"]["n"]["value"] == sum(targets == 2)


def reference_curve(truth, score, thresholds):
    "Net benefit as the source writes it, counted one by one: true / n - false positives / n * t / (1 - t)."
    rows = []
    for t in thresholds:
        tp = sum(1 for y, p in zip(truth, score) if p >= t and y)
        fp = sum(1 for y, p in zip(truth, score) if p >= t and not y)
        rows.append(tp / len(truth) - fp / len(truth) * t / (1 - t))
    return rows


@pytest.mark.parametrize("ties", [False, True])
def test_decision_curve_is_the_reference(ties):
    "At 60 thresholds, with scores that stand on them."
    malignant, score, ids = scores(300, 4)
    score = score.round(2) if ties else score
    curve = decision_curve(malignant, score, lesion_ids=ids, n_resamples=200)
    difference = np.abs(curve["model"] - reference_curve(malignant, score, curve["threshold"])).max()
    print(f"\nnet benefit, ties {ties}: largest difference from the count by hand {difference:.1e}")
    assert difference < 1e-12
    assert (curve["low"] <= curve["model"]).all() and (curve["model"] <= curve["high"]).all()
    prevalence = malignant.mean()
    everyone = prevalence - (1 - prevalence) * curve["threshold"] / (1 - curve["threshold"])
    np.testing.assert_allclose(curve["treat_all"], everyone, atol=1e-12)
