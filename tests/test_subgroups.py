"Subgroups: planted gaps get a verdict, absent gaps get none, and limits hold the truth as often as their level."
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from skinlesion.stats.intervals import find_leaf, percentile_interval, wilson_interval
from skinlesion.stats.metrics import weighted_auroc
from skinlesion.stats.resamples import Resamples
from skinlesion.evaluate.subgroups import combined_limits, gap_metrics, subgroup_scorecard, subgroup_table
from skinlesion.taxonomy import LabelSet, get_label_set
from shares import report

TWO = get_label_set("melanoma")
HAM = get_label_set("ham10000")
SAID = ("higher", "lower")


def draw(n, rng, pull=1.2, groups=("A", "B"), shares=(.4, .6)):
    """Truth, score, group and lesion of images: one to three a lesion, a third malignant.

    In the first group the logits of malignant lesions are lower by `pull`.
    """
    lesion = np.repeat(np.arange(n), rng.integers(1, 4, n))
    ill = rng.random(n) < 1 / 3
    group = rng.choice(len(groups), n, p=shares)
    logit = 1.1 * rng.normal(size=n) + np.where(ill, 1.6 - pull * (group == 0), -1.4)
    logit = logit[lesion] + .6 * rng.normal(size=len(lesion))
    return ill[lesion], 1 / (1 + np.exp(-logit)), np.array(groups)[group[lesion]], lesion


def tables(ill, score, group, lesion):
    "The same as the two tables that evaluation takes."
    ids = [f"i{k:06d}" for k in range(len(ill))]
    predictions = pd.DataFrame(dict(image_id=ids, p_benign=1 - score, p_mel=score))
    return predictions, pd.DataFrame(
        dict(image_id=ids, lesion_id=lesion, diagnosis=np.where(ill, "mel", "benign"), ward=group)
    )


def plain(ill, score, rows):
    "The metrics of some rows, by other means."
    called = score >= .5
    return {"accuracy": (called == ill)[rows].mean(), "malignant.auroc": roc_auc_score(ill[rows], score[rows]),
            "malignant.sensitivity": called[rows & ill].mean(), "malignant.specificity": (~called)[rows & ~ill].mean(),
            "malignant.calibration_in_the_large": (score - ill)[rows].mean()}


@pytest.fixture(scope="module")
def truth():
    "The gap of group A, from so many lesions that it does not move."
    ill, score, group, _ = draw(300_000, np.random.default_rng(12345))
    inside, outside = (plain(ill, score, group == name) for name in "AB")
    return {name: inside[name] - outside[name] for name in inside}


def test_every_figure_equals_its_definition():
    ill, score, group, lesion = draw(300, np.random.default_rng(1))
    card = subgroup_scorecard(*tables(ill, score, group, lesion), TWO, ["ward"], n_resamples=20)["ward"]
    by_hand = {name: plain(ill, score, group == name) for name in "AB"}
    assert set(gap_metrics(dict(ward=card))) == set(by_hand["A"])
    for name, value in by_hand["A"].items():
        assert find_leaf(card["A"], name)["value"] == pytest.approx(value, abs=1e-12)
        assert find_leaf(card["A"]["gap"], name)["value"] == pytest.approx(value - by_hand["B"][name], abs=1e-12)
        mirror = find_leaf(card["B"]["gap"], name)  # two groups: the gap of the one is that of the other, turned round
        assert [-mirror["high"], -mirror["low"]] == pytest.approx(
            [find_leaf(card["A"]["gap"], name)[k] for k in ("low", "high")], abs=1e-12
        )


def coverage(truth, runs, seed, n=320, least=20):
    "How often the limits of each gap hold the truth, of how many, and how often the planted gap has a verdict."
    held = dict.fromkeys(truth, 0)
    given = dict.fromkeys(truth, 0)
    called = 0
    for k in range(runs):
        drawn = tables(*draw(n, np.random.default_rng([seed, k])))
        cell = subgroup_scorecard(*drawn, TWO, ["ward"], min_lesions=least, n_resamples=400, seed=k)["ward"]["A"]
        for name in truth:
            leaf = find_leaf(cell["gap"], name)
            if leaf["low"] is None:
                continue
            held[name] += leaf["low"] <= truth[name] <= leaf["high"]
            given[name] += 1
        called += cell["gap"]["malignant"]["sensitivity"]["verdict"] == "lower"
    return held, given, called


def percentile_coverage(truth, runs, seed, n):
    "How often percentile limits of the same gaps would: accuracy, sensitivity and AUROC."
    held, given = (dict.fromkeys(("accuracy", "malignant.sensitivity", "malignant.auroc"), 0) for _ in range(2))
    for k in range(runs):
        ill, score, group, lesion = draw(n, np.random.default_rng([seed, k]))
        weights = Resamples(lesion, 400, k).weights[1:]
        a = group == "A"
        def share(rows, right):
            return weights[:, rows] @ right[rows] / np.maximum(weights[:, rows].sum(1), 1)
        def gap(inside, outside, right):
            return share(inside, right) - share(outside, right)
        def area(rows):
            return weighted_auroc(ill[rows], score[rows], weights[:, rows])
        right = (score >= .5) == ill
        gaps = {
            "accuracy": gap(a, ~a, right),
            "malignant.sensitivity": gap(a & ill, ~a & ill, right),
            "malignant.auroc": area(a) - area(~a),
        }
        for name, samples in gaps.items():
            low, high = percentile_interval(samples)
            held[name] += low <= truth[name] <= high
            given[name] += low == low
    return held, given


def test_limits_of_planted_gaps_hold_the_truth_subset(truth):
    held, given, called = coverage(truth, 40, seed=7)
    for name, hits in held.items():
        report(f"gap of {name}", hits, given[name])
        assert hits >= .95 * given[name] and given[name] == 40, (name, hits)
    assert report("planted gap of sensitivity called", called, 40)[0] > .6, called


@pytest.mark.slow
@pytest.mark.parametrize("n, least", [(120, 10), (320, 20)])
def test_limits_of_planted_gaps_hold_the_truth(truth, n, least):
    held, given, called = coverage(truth, 600, 8, n, least)
    rivals, told = percentile_coverage(truth, 600, 8, n)
    for name, hits in held.items():
        low, high = report(f"{n} lesions, gap of {name}", hits, given[name])
        if name in rivals:
            report(f"{n} lesions, gap of {name} by percentiles", rivals[name], told[name])
        assert high >= .95 and low >= .91, (name, hits)
    report("planted gap of sensitivity called", called, 600)


def false_alarms(runs, seed):
    "On how many cards five meaningless columns of groups show a gap: by the verdict and by plain limits."
    metrics = (
        "accuracy",
        "malignant.auroc",
        "malignant.sensitivity",
        "malignant.specificity",
        "malignant.calibration_in_the_large",
    )
    alarms, limits = (dict.fromkeys(metrics, 0) for _ in range(2))
    for k in range(runs):
        rng = np.random.default_rng([seed, k])
        ill, score, group, lesion = draw(320, rng, pull=0)
        predictions, labels = tables(ill, score, group, lesion)
        for c in range(5):
            labels[f"c{c}"] = rng.choice(list("wxyz"), lesion.max() + 1)[lesion]
        card = subgroup_scorecard(predictions, labels, TWO, [f"c{c}" for c in range(5)], n_resamples=400, seed=k)
        gaps = {
            name: [find_leaf(cell["gap"], name) for groups in card.values() for cell in groups.values()]
            for name in alarms
        }
        for name, leaves in gaps.items():
            alarms[name] += any(leaf["verdict"] in SAID for leaf in leaves)
            limits[name] += any(leaf["value"] is not None and (leaf["low"] > 0 or leaf["high"] < 0) for leaf in leaves)
    return alarms, limits


def test_no_gap_is_called_where_there_is_none_subset():
    alarms, limits = false_alarms(10, seed=3)
    assert max(alarms.values()) <= 2, alarms
    assert limits["accuracy"] > alarms["accuracy"], (
        "with twenty gaps, plain limits leave out zero somewhere; the verdict must know better"
    )


@pytest.mark.slow
def test_no_gap_is_called_where_there_is_none():
    alarms, limits = false_alarms(300, seed=4)
    for name, hits in alarms.items():
        assert report(f"cards with a false alarm of {name}", hits, 300)[0] <= .06, (name, hits)
    for name in alarms:
        report(f"{name}: by plain limits", limits[name], 300)


def test_images_are_not_lesions():
    "Each lesion photographed four times alike says no more than once; the limits must not know the difference."
    ill, score, group, lesion = draw(200, np.random.default_rng(5))
    once = np.unique(lesion, return_index=True)[1]
    four = np.repeat(once, 4)
    one, many = (
        subgroup_scorecard(*tables(ill[rows], score[rows], group[rows], lesion[rows]), TWO, ["ward"])["ward"]["A"]
        for rows in (once, four)
    )
    for name in ("accuracy", "malignant.auroc", "malignant.sensitivity"):
        for a, b in (
            (find_leaf(one, name), find_leaf(many, name)),
            (find_leaf(one["gap"], name), find_leaf(many["gap"], name)),
        ):
            assert [a[k] for k in ("value", "low", "high")] == pytest.approx(
                [b[k] for k in ("value", "low", "high")], abs=1e-9
            )
            assert a["n_lesions"] == b["n_lesions"] and 4 * a["n"] == b["n"]


def test_a_lesion_may_stand_on_both_sides():
    "Images of one lesion at two ages: both groups count it, and nothing breaks."
    ill, score, _, lesion = draw(200, np.random.default_rng(6))
    predictions, labels = tables(ill, score, "A", lesion)
    labels["age"] = np.where(np.arange(len(labels)) % 2, 29, 31)
    card = subgroup_scorecard(predictions, labels, TWO, ["age_band"], n_resamples=50)["age_band"]
    assert sum(cell["n"]["n_lesions"] for cell in card.values()) > labels.lesion_id.nunique() == 200
    assert all(
        cell["gap"]["accuracy"]["low"] is not None and cell["gap"]["accuracy"]["n_lesions"] == 200
        for cell in card.values()
    )


def test_what_is_too_few_is_counted_where_it_counts():
    "Two hundred lesions of which three are malignant say much about specificity and nothing about sensitivity."
    rng = np.random.default_rng(2)
    ill = np.arange(200) < 3
    score = rng.random(200)
    drawn = tables(ill, score, np.where(np.arange(200) < 100, "A", "B"), np.arange(200))
    cell = subgroup_scorecard(*drawn, TWO, ["ward"], n_resamples=50)["ward"]["A"]
    assert cell["malignant"]["specificity"]["value"] is not None and cell["accuracy"]["value"] is not None
    for name in ("sensitivity", "auroc"):
        assert cell["malignant"][name]["reason"] == "too few to say: 3 malignant lesions, at least 20 are asked for"
    assert cell["gap"]["malignant"]["auroc"]["verdict"] == "too few to say"
    assert subgroup_table(dict(ward=dict(A=cell)), ["malignant.auroc"]).text[0] == "too few to say"


def test_a_perfect_side_does_not_make_a_gap_sure():
    "Twenty-one of twenty-one against four fifths: the one's certainty is only Wilson's."
    ill = np.ones(121, bool)
    group = np.where(np.arange(121) < 21, "A", "B")
    score = np.where((group == "B") & (np.arange(121) % 5 == 0), .2, .8)
    predictions, labels = tables(np.r_[ill, ~ill], np.r_[score, 1 - score], np.r_[group, group], np.arange(242))
    gap = subgroup_scorecard(predictions, labels, TWO, ["ward"])["ward"]["A"]["gap"]["malignant"]["sensitivity"]
    def side(share, n):
        return dict(zip(("value", "low", "high"), (share, *wilson_interval(share, n))))
    near = combined_limits(side(1, 21), side(.8, 100))
    assert gap["value"] == pytest.approx(.2) and abs(gap["low"] - near[0]) < .02 and abs(gap["high"] - near[1]) < .02


def test_groups_beyond_the_known_ones():
    ill, score, group, lesion = draw(300, np.random.default_rng(9))
    predictions, labels = tables(ill, score, group, lesion)
    labels = labels.assign(
        source=np.where(group == "A", "clinic 1", None), sex=np.where(group == "A", "F", "male"), age=50, extra=7
    )
    card = subgroup_scorecard(predictions, labels, TWO, n_resamples=20)
    assert {c: list(groups) for c, groups in card.items()} == dict(
        sex=["female", "male"], age_band=["50-69"], source=["clinic 1", "unknown"]
    )
    assert card["age_band"]["50-69"]["gap"]["accuracy"]["reason"] == "every image is in this group"
    with pytest.raises(ValueError, match="no column 'sxe' to group by.*Did you mean 'sex'"):
        subgroup_scorecard(predictions, labels, TWO, ["sxe"])
    with pytest.raises(ValueError, match="column 'lesion_id' has 300 groups, at most 40"):
        subgroup_scorecard(predictions, labels, TWO, ["lesion_id"])
    with pytest.raises(ValueError, match=r"labels row 4: age '180'"):
        subgroup_scorecard(
            predictions, labels.assign(age=np.where(np.arange(len(labels)) == 2, 180, 50))[::1], TWO, ["age_band"]
        )


def test_undecided_classes_stand_aside_and_unknown_malignancy_says_so():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(9), 400)
    targets = np.arange(400) % 9
    isic = get_label_set("isic2019")
    ids = [f"i{k}" for k in range(400)]
    predictions = pd.DataFrame(probs, columns=[f"p_{c}" for c in isic.codes]).assign(image_id=ids)
    labels = pd.DataFrame(
        dict(image_id=ids, diagnosis=np.array(isic.codes)[targets], ward=np.where(np.arange(400) % 2, "A", "B"))
    )
    cell = subgroup_scorecard(predictions, labels, isic, ["ward"], n_resamples=20)["ward"]["A"]
    decided = (labels.diagnosis != "unk").sum()
    assert cell["malignant"]["auroc"]["n"] < cell["accuracy"]["n"] and cell["gap"]["malignant"]["auroc"]["n"] == decided
    own = LabelSet("own", isic.codes, isic.names, None)
    cell = subgroup_scorecard(predictions, labels, own, ["ward"], n_resamples=20)["ward"]["A"]
    one_by_one = [roc_auc_score(targets[1::2] == c, probs[1::2, c]) for c in range(9)]
    assert "malignant" not in cell and cell["auroc_macro"]["value"] == pytest.approx(np.mean(one_by_one))
    without = labels.diagnosis.ne("df") | labels.ward.ne("A")
    cell = subgroup_scorecard(predictions[without], labels[without], own, ["ward"], n_resamples=20)["ward"]["A"]
    assert cell["auroc_macro"]["reason"] == "too few to say: 0 df lesions, at least 20 are asked for"
