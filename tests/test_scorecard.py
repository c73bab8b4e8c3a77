"""The scorecard against hand-computed values and plain loops, and its reasons where a value is undefined."""
import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from skinlesion.evaluate.benchmarks import BenchmarkError, BenchmarkId, check_comparable, identify
from skinlesion.stats.intervals import expanded_level, wilson_interval
from skinlesion.stats.resamples import Resamples
from skinlesion.stats.metrics import BINARY, METRICS, PER_CLASS, WHOLE
from skinlesion.data.tables import align_tables, infer_label_set, read_labels, read_predictions, write_predictions
from skinlesion.evaluate.scorecard import compare_predictions, scorecard
from skinlesion.stats.cards import SHARES, card_table, deciding_lesions, image_resamples
from skinlesion.taxonomy import probability_columns
from skinlesion.taxonomy import LABEL_SETS, LabelSet, get_label_set

HAM = get_label_set("ham10000")


def made(n=400, lesions=260, classes=7, skill=1.5, seed=0, label_set=HAM):
    "Predictions and labels of `n` images, several of a lesion; the images of a lesion are alike."
    rng = np.random.default_rng(seed)
    lesion = rng.integers(0, lesions, n)
    targets = rng.permutation(np.arange(lesions) % classes)[lesion]
    scores = (
        rng.normal(size=(n, label_set.num_classes)) + 0.7 * rng.normal(size=(lesions, label_set.num_classes))[lesion]
    )
    scores = np.exp(scores + skill * np.eye(label_set.num_classes)[targets])
    ids = [f"i{k}" for k in range(n)]
    labels = pd.DataFrame(
        dict(image_id=ids, lesion_id=[f"l{k}" for k in lesion], diagnosis=[label_set.codes[t] for t in targets])
    )
    return pd.DataFrame(scores / scores.sum(1, keepdims=True), columns=probability_columns(label_set)).assign(
        image_id=ids
    ), labels


def leaves(card, path=()):
    "Every leaf with its place."
    if "value" in card:
        yield ".".join(path), card
    else:
        for key, inner in card.items():
            yield from leaves(inner, (*path, key))


def check_card(card, n, resamples=True):
    "Any card is plain JSON with all metrics, each in range and inside its interval, or with a reason."
    json.dumps(card, allow_nan=False)
    assert {*card} >= {*WHOLE, "per_class", "malignant"} and {*card["malignant"]} >= {*BINARY}
    assert all({*c} == {"n", *PER_CLASS} for c in card["per_class"].values())
    for place, leaf in leaves(card):
        assert 0 <= leaf["n"] <= n, place
        if place.endswith(".n"):
            continue
        assert {"value", "low", "high", "n", "n_lesions", "method"} <= {*leaf} and leaf["n_lesions"] <= leaf["n"], place
        if leaf["value"] is None or leaf["low"] is None:
            assert leaf["reason"] and leaf["low"] is None and leaf["high"] is None, place
        else:
            assert leaf["low"] <= leaf["value"] <= leaf["high"] and "reason" not in leaf and resamples, place
        name = place.split(".")[-1]
        metric = METRICS[PER_CLASS.get(name, name) if "." in place else name]
        for limit, sign in ((metric.low, 1), (metric.high, -1)):
            if leaf["value"] is not None and limit is not None:
                assert sign * (leaf["value"] - limit) >= -1e-12, place


def test_four_images_by_hand():
    "Two classes, four images of four lesions, every number worked out on paper."
    pair = get_label_set("melanoma")
    labels = pd.DataFrame(
        dict(image_id=list("abcd"), lesion_id=list("wxyz"), diagnosis=["mel", "mel", "benign", "benign"])
    )
    mel = np.array([.9, .4, .6, .1])  # called mel, benign, mel, benign: one of each right
    card = scorecard(labels[["image_id"]].assign(p_mel=mel, p_benign=1 - mel), labels, pair, 200)
    check_card(card, 4)
    def value(place):
        return dict(leaves(card))[place]["value"]
    assert (
        value("accuracy")
        == value("balanced_accuracy")
        == value("malignant.sensitivity")
        == value("per_class.mel.ppv")
        == 0.5
    )
    assert (
        value("auroc_macro") == value("malignant.auroc") == value("per_class.benign.auroc") == 0.75
    ) # three of four pairs in order
    assert value("top2_accuracy") == 1 and abs(value("mcc")) < 1e-12 and abs(value("kappa")) < 1e-12
    assert abs(value("log_loss") + np.log([.9, .4, .4, .9]).mean()) < 1e-12
    assert (
        abs(value("brier") - 2 * np.mean([0.01, 0.36, 0.36, 0.01])) < 1e-12
        and abs(value("malignant.brier") - np.mean([0.01, 0.36, 0.36, 0.01])) < 1e-12
    )
    assert value("malignant.specificity") == .5 and value("malignant.n") == 2
    np.testing.assert_allclose([card["accuracy"]["low"], card["accuracy"]["high"]], wilson_interval(.5, 4))
    assert (
        card["accuracy"]["method"] == "Wilson, each lesion once" and card["malignant"]["sensitivity"]["n_lesions"] == 2
    )


def test_intervals_are_those_of_a_plain_loop():
    "A loop that repeats the rows of the lesions drawn and calls scikit-learn gives the same ends."
    predictions, labels = made(150, 90)
    card = scorecard(predictions, labels, HAM, 60, seed=3)
    probs = predictions[probability_columns(HAM)].to_numpy()
    targets = labels.diagnosis.map(HAM.index).to_numpy()
    order = np.argsort(labels.image_id.to_numpy(object), kind="stable")
    drawn = Resamples(labels.lesion_id.to_numpy()[order], 60, 3).weights[1:]
    rows = [np.repeat(order, w) for w in drawn]
    assert all(len(np.unique(targets[r])) == 7 for r in rows)
    call = probs.argmax(1)
    slow = dict(
        balanced_accuracy=lambda r: sk.balanced_accuracy_score(targets[r], call[r]),
        f1_macro=lambda r: sk.f1_score(targets[r], call[r], average="macro"),
        auroc_macro=lambda r: sk.roc_auc_score(targets[r], probs[r], multi_class="ovr"),
        log_loss=lambda r: sk.log_loss(targets[r], probs[r]),
        mcc=lambda r: sk.matthews_corrcoef(targets[r], call[r]),
        kappa=lambda r: sk.cohen_kappa_score(targets[r], call[r]),
    )
    lesions = labels.lesion_id.nunique()
    data = align_tables(predictions, labels, HAM)
    resamples = image_resamples(data.image_ids, data.lesion_ids, 0)
    def ends(values, hangs_on):
        return np.quantile(values, [(1 + sign * expanded_level(min(hangs_on, lesions))) / 2 for sign in (-1, 1)])
    for name, measure in slow.items():
        low, high = ends([measure(r) for r in rows], deciding_lesions(name, data.targets, HAM, resamples) or lesions)
        np.testing.assert_allclose(
            [card[name][k] for k in ("value", "low", "high")],
            [measure(np.arange(150)), low, high],
            rtol=1e-9,
            err_msg=name,
        )
    low, high = ends(
        [sk.precision_score(targets[r] == 5, call[r] == 5) for r in rows], labels.lesion_id[call == 5].nunique()
    )
    np.testing.assert_allclose([card["per_class"]["nv"]["ppv"][k] for k in ("low", "high")], [low, high])


@pytest.mark.parametrize("name", LABEL_SETS)
def test_every_label_set_has_a_whole_card(name):
    label_set = get_label_set(name)
    predictions, labels = made(300, 200, label_set.num_classes, label_set=label_set)
    card = scorecard(predictions, labels, label_set, 100)
    check_card(card, 300)
    assert all(leaf["value"] is not None for _, leaf in leaves(card))
    undecided = labels.diagnosis.isin(label_set.undecided).sum()
    assert card["malignant"]["n"]["n"] == 300 - undecided and (undecided > 0) == (name == "isic2019")


def test_each_metric_counts_the_images_it_is_over():
    predictions, labels = made()
    card = scorecard(predictions, labels, HAM, 50)
    call = predictions[probability_columns(HAM)].to_numpy().argmax(1)
    mel = card["per_class"]["mel"]
    over = dict(
        sensitivity=labels.diagnosis == "mel",
        specificity=labels.diagnosis != "mel",
        ppv=call == 4,
        npv=call != 4,
        auroc=call >= 0,
    )
    for name, mask in over.items():
        assert (mel[name]["n"], mel[name]["n_lesions"]) == (mask.sum(), labels.lesion_id[mask].nunique()), name
    assert set(SHARES) - {"accuracy", "top2_accuracy"} == {*over} - {"auroc"}


def test_order_of_rows_and_of_columns_changes_no_byte():
    predictions, labels = made(120, 80)
    shuffled = predictions.sample(frac=1, random_state=0)[sorted(predictions.columns, reverse=True)]
    one = scorecard(predictions, labels, HAM, 50)
    two = scorecard(shuffled, labels.sample(frac=1, random_state=1), HAM, 50)
    assert json.dumps(one) == json.dumps(two)
    first, second = (
        compare_predictions(p, made(120, 80, seed=0, skill=3)[0], labels, HAM, 50) for p in (predictions, shuffled)
    )
    assert json.dumps(first) == json.dumps(second)


@pytest.mark.parametrize("keep, place, said", [
    (lambda d: d == "nv", "auroc_macro", "every image is of class nv"),
    (lambda d: d == "nv", "per_class.nv.specificity", "every image is of class nv"),
    (lambda d: d == "nv", "malignant.auroc", "no image is malignant"),
    (lambda d: d.isin(["mel", "bcc"]), "malignant.specificity", "every image is malignant"),
    (
        lambda d: d != "df",
        "balanced_accuracy",
        "no image of class df; a mean over the other classes would be another metric",
    ),
    (lambda d: d != "df", "per_class.df.f1", "no image of class df")])
def test_what_is_undefined_is_null_with_its_reason(keep, place, said):
    predictions, labels = made()
    labels = labels[keep(labels.diagnosis)]
    card = scorecard(predictions[predictions.image_id.isin(labels.image_id)], labels, HAM, 50)
    check_card(card, len(labels))
    leaf = dict(leaves(card))[place]
    assert leaf["value"] is None and leaf["reason"] == said
    assert card["accuracy"]["value"] is not None and card["log_loss"]["value"] is not None


def test_too_few_for_an_interval():
    predictions, labels = made(60, 30)
    one = labels[labels.lesion_id == labels.lesion_id[0]]
    card = scorecard(predictions[predictions.image_id.isin(one.image_id)], one, HAM, 50)
    check_card(card, len(one))
    assert card["accuracy"]["reason"] == "no interval: 1 lesion(s), at least 2 are needed"
    none = scorecard(predictions, labels, HAM, 0)
    check_card(none, 60, resamples=False)
    assert none["brier"]["value"] is not None and none["brier"]["reason"] == "no interval: no resamples were asked for"
    never = scorecard(predictions.assign(p_df=0., p_nv=predictions.p_nv + predictions.p_df), labels, HAM, 50)
    assert (
        never["per_class"]["df"]["ppv"]["reason"] == "no image is called df"
        and never["per_class"]["df"]["sensitivity"]["value"] == 0
    )


def test_stratified_resamples_keep_a_rare_class():
    "With three lesions of a class some resamples hold none, unless each class is redrawn within itself."
    predictions, labels = made(500, 300)
    rare = labels.lesion_id.isin(labels.lesion_id[labels.diagnosis == "df"].unique()[:3])
    labels = labels[rare | (labels.diagnosis != "df")]
    predictions = predictions[predictions.image_id.isin(labels.image_id)]
    free, kept = (scorecard(predictions, labels, HAM, 300, stratified=s)["balanced_accuracy"] for s in (False, True))
    assert free["value"] == kept["value"] and kept["low"] is not None and "stratified by class" in kept["method"]


def test_without_malignancy_only_that_is_missing():
    predictions, labels = made()
    card = scorecard(predictions, labels, LabelSet("own", HAM.codes), 20)
    check_card(card, 400)
    assert {leaf["reason"] for leaf in card["malignant"].values()} == {
        "label set own does not say which classes are malignant"
    }
    assert "malignant_auroc" not in compare_predictions(
        predictions, predictions, labels, LabelSet("own", HAM.codes), 20
    )


def test_the_table_of_a_card_has_a_row_per_leaf():
    card = scorecard(*made(), HAM, 20)
    table = card_table(card)
    assert (
        len(table) == len(list(leaves(card)))
        and table[(table.metric == "mcc") & (table["class"] == "")].value.item() == card["mcc"]["value"]
    )


@pytest.mark.parametrize("old, new, said", [
    (",", "|", "as if '|' divided columns"),
    ("\ni3,", "\ni2,", "row 5 (image_id 'i2'): the id stands in row 4 already"),
    ("p_mel", "p_mela", "column 'p_mela' belongs to no class of label set ham10000"),
    ("p_vasc", "vasc", "column p_vasc missing"),
    ("\ni3,0.", "\ni3,10.", "row 5 (image_id 'i3'): p_akiec is 10."),
    ("\ni3,", "\ni3,x", "row 5 (image_id 'i3'): p_akiec is 'x"),
    ("\ni3,", "\n\n\ni3,-", "row 7 (image_id 'i3'): p_akiec is -"),
    ("\ni3,", "\n,", "row 5: image_id is empty"),
    ("image_id", "image", "no column image_id"),
    ("\ni3,", '\n"i3,', "not readable as CSV"),
    ("\ni3,", "\ni3,nan,", "cells where the header has"),
])
def test_a_bad_table_names_file_row_and_remedy(tmp_path, old, new, said):
    write_predictions(made(20, 15)[0], tmp_path / "p.csv")
    (tmp_path / "bad.csv").write_text((tmp_path / "p.csv").read_text().replace(old, new))
    with pytest.raises(ValueError) as caught:
        read_predictions(tmp_path / "bad.csv", HAM)
    assert said in str(caught.value) and "bad.csv" in str(caught.value)


def test_tables_as_other_programs_save_them(tmp_path):
    predictions, labels = made(20, 15)
    write_predictions(predictions, tmp_path / "p.csv")
    plain = read_predictions(tmp_path / "p.csv", HAM)
    text = (tmp_path / "p.csv").read_bytes()
    forms = (
        b"\xef\xbb\xbf" + text,
        text.replace(b",", b";"),
        text.replace(b",", b"\t"),
        text.replace(b"\n", b"\r\n"),
        text.replace(b"\n", b"\n\n"),
    )
    assert all(read_predictions(form, HAM).equals(plain) for form in forms)
    labels.assign(age="", site="back").to_csv(tmp_path / "l.csv", index=False)
    table = read_labels(tmp_path / "l.csv", HAM)
    assert (
        table.columns.tolist() == ["image_id", "diagnosis", "lesion_id", "age", "site"]
        and table.age.isna().all()
        and "lines" not in table.attrs
    )


def test_label_sets_are_read_off_the_columns():
    for known in LABEL_SETS.values():
        assert infer_label_set(pd.DataFrame(columns=["image_id", *probability_columns(known)[::-1]])) == known
    assert infer_label_set(pd.DataFrame(columns=["p_a", "p_b"])) == LabelSet("columns", ("a", "b"))


def test_the_better_of_two_is_found_and_equals_are_not_told_apart():
    _, labels = made()
    good = made(skill=2.5)[0]
    bad = made(skill=1.)[0]
    found = compare_predictions(good, bad, labels, HAM, 300)
    back = compare_predictions(bad, good, labels, HAM, 300)
    for name in ("accuracy", "auroc_macro", "log_loss", "malignant_auroc", "malignant_auroc_delong"):
        assert (found[name]["verdict"], back[name]["verdict"]) == ("better", "worse"), name
        assert found[name]["value"] == pytest.approx(found[name]["first"] - found[name]["second"])
    assert found["malignant_auroc_delong"]["p"] < .001
    assert found["malignant_auroc_delong"]["high"] - found["malignant_auroc_delong"]["low"] == pytest.approx(
        found["malignant_auroc"]["high"] - found["malignant_auroc"]["low"], rel=.25)  # two ways to one interval
    same = compare_predictions(good, good, labels, HAM, 50)
    assert {leaf["verdict"] for leaf in same.values()} == {"not distinguishable"} and all(
        leaf["value"] == 0 for leaf in same.values()
    )


@pytest.mark.slow
def test_a_verdict_is_rarely_wrong_where_there_is_no_difference():
    "Two readers of equal skill, 200 times: about one in twenty may be told apart."
    wrong = 0
    for seed in range(200):
        _, labels = made(200, 140, seed=seed)
        one = made(200, 140, seed=seed)[0]
        two = made(200, 140, seed=seed)[0]
        rng = np.random.default_rng(seed)
        columns = probability_columns(HAM)
        for table in (one, two):
            noisy = np.exp(np.log(table[columns].to_numpy()) + rng.normal(size=(200, 7)))
            table[columns] = noisy / noisy.sum(1, keepdims=True)
        wrong += compare_predictions(one, two, labels, HAM, 200)["auroc_macro"]["verdict"] != "not distinguishable"
    print(f"{wrong} of 200 told apart")
    assert wrong <= 22


def test_a_result_of_a_leaked_split_is_not_held_against_a_clean_one():
    rows = pd.DataFrame(
        dict(image_id=list("abcd"), lesion_id=["1", "1", "2", "3"], split=["train", "train", "valid", "test"])
    )
    clean, leaked = (
        identify(BenchmarkId("made-up"), rows.assign(split=s)) for s in (rows.split, ["train", "test", "valid", "test"])
    )
    with pytest.raises(BenchmarkError, match="leak: A 0, B 1"):
        check_comparable(clean, leaked, ("A", "B"))
    assert check_comparable(clean, clean, ("A", "B")) == tuple(f"{x} (made-up): unknown kind of images" for x in "AB")


def test_who_holds_the_test_images_alone_names_the_same_split():
    rows = pd.DataFrame(
        dict(image_id=list("abcd"), lesion_id=["1", "1", "2", "3"], split=["train", "train", "valid", "test"])
    )
    whole, part, more = (
        identify(BenchmarkId("made-up"), t) for t in (rows, rows[2:], rows.replace(dict(split=dict(valid="train"))))
    )
    said = ("A (made-up): unknown kind of images", "B (made-up): unknown kind of images, leak between its parts")
    assert check_comparable(whole, part, ("A", "B")) == said
    assert whole == more and part.leak is None
    other = identify(BenchmarkId("made-up"), rows.assign(image_id=list("abce")))
    with pytest.raises(BenchmarkError, match="split_sha256: A"):
        check_comparable(whole, other, ("A", "B"))


def test_splits_are_known_by_their_usual_words(tmp_path):
    predictions, labels = made(20, 15)
    words = ["Test", "validation", "VAL", "training", "clinic A"] * 4
    meant = ["test", "valid", "valid", "train", "clinic A"] * 4
    labels.assign(split=words).to_csv(tmp_path / "l.csv", index=False)
    write_predictions(predictions.assign(split=words), tmp_path / "p.csv")
    assert (
        read_labels(tmp_path / "l.csv", HAM).split.tolist()
        == read_predictions(tmp_path / "p.csv", HAM).split.tolist()
        == meant
    )


def test_a_single_column_of_probabilities_is_no_table():
    with pytest.raises(
        ValueError,
        match="p_mel is the only column of probabilities; give one for each class, for two classes such as p_benign",
    ):
        infer_label_set(pd.DataFrame(columns=["image_id", "p_mel"]))
