"The synthetic set as an instrument: what it states of itself is so, in numbers and in pixels."
import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import skinlesion.synthetic.truth as made
from skinlesion.data.schema import read_dataset
from skinlesion.synthetic.draw import LOOKALIKES, TONES
from skinlesion.synthetic.truth import (
    NEAR_KINDS,
    READERS,
    SyntheticOptions,
    alter,
    bayes_figures,
    bayes_model,
    information,
    synthetic_options,
    make_synthetic,
    plan_synthetic,
    read_truth,
)
from skinlesion.stats.intervals import wilson_interval
from skinlesion.images import read_image, read_mask

LEVEL = .9999  # of intervals: about a hundred are checked, so that a false alarm is rare
FAULTY = synthetic_options(
    per_class=8,
    size=(56, 64),
    seed=2,
    views=2,
    exact_duplicates=3,
    recoded_duplicates=3,
    near_duplicates=24,
    label_errors=0.06,
    duplicate_lesions="mixed",
    duplicate_splits="mixed",
    crossing_lesions=2,
    crossing_patients=1,
    conflicting_lesions=2,
    skin_tones="range",
    severity=True,
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    "A set with one of everything, and its truth."
    data = make_synthetic(tmp_path_factory.mktemp("truth") / "set", FAULTY)
    return data, read_truth(data.root)


LAWS = [(.2, 1.), *(pytest.param(p, marks=pytest.mark.slow) for p in ((.35, .4), (0., 1.), (.2, 0.)))]


@pytest.fixture(scope="module", params=LAWS, ids=lambda p: f"ambiguity {p[0]}, signal {p[1]}")
def large(request):
    "A plan of 10^5 images, one to a lesion, and its law."
    ambiguity, signal = request.param
    options = SyntheticOptions(
        n_images=100_000, views=1, exact_duplicates=0, ambiguity=ambiguity, metadata_signal=signal, missing=0.1, seed=5
    )
    plan = plan_synthetic(options)
    law = bayes_model(options)
    return plan, law, plan.true_diagnosis.to_numpy()[:, None] == np.array(law.codes)


def answers(plan, law, reader):
    "The probabilities that a reader gives to each image."
    picture, metadata = READERS[reader]
    return law.posterior(plan.appearance if picture else None, plan if metadata else None)


def pixels(data, image_id):
    return read_image(data.image_path(image_id))


# ---- the law

@pytest.mark.parametrize("reader", READERS)
def test_best_reader_is_calibrated(large, reader):
    plan, law, truth = large
    probs = answers(plan, law, reader)
    checked = 0
    for k in range(len(law.codes)):
        for low, high in itertools.pairwise(np.linspace(0, 1, 11)):
            rows = (probs[:, k] > low) & (probs[:, k] <= high) & (probs[:, k] < 1)
            if rows.sum() < 200:
                continue
            lowest, highest = wilson_interval(truth[rows, k].mean(), int(rows.sum()), LEVEL)
            assert lowest <= probs[rows, k].mean() <= highest, (law.codes[k], low, high, int(rows.sum()))
            checked += 1
    assert checked >= 7 or law.appearance.trace() == len(law.codes)


@pytest.mark.parametrize("reader", READERS)
def test_figures_are_what_the_best_reader_reaches(large, reader):
    plan, law, truth = large
    probs = answers(plan, law, reader)
    stated = bayes_figures(law.joint(*READERS[reader]))
    loss = -np.log(probs[truth])
    hit = probs.argmax(1) == truth.argmax(1)
    assert abs(loss.mean() - stated["log_loss"]) <= 4 * loss.std() / math.sqrt(len(loss)) + 1e-9
    assert (
        abs(hit.mean() - stated["accuracy"])
        <= 4 * math.sqrt(stated["accuracy"] * (1 - stated["accuracy"]) / len(hit)) + 1e-9
    )
    assert roc_auc_score(truth, probs) == pytest.approx(stated["auroc_macro"], abs=.004)
    balanced = (probs / law.prior).argmax(1) == truth.argmax(1)
    assert np.mean([balanced[truth[:, k]].mean() for k in range(7)]) == pytest.approx(
        stated["balanced_accuracy"], abs=0.012
    )


def test_words_and_appearances_keep_their_law(large):
    plan, law, _ = large
    tables = dict(appearance=(law.codes, law.appearance)) | law.tables
    for (name, (words, table)), (k, code) in itertools.product(tables.items(), enumerate(law.codes)):
        column = plan[name][plan.true_diagnosis == code]
        column = column[(column != "") & column.notna()]
        for word, chance in zip(words, table[k]):
            low, high = wilson_interval(float((column == word).mean()), len(column), .99999)
            assert low - 1e-12 <= chance <= high + 1e-12, (name, code, word)


def test_information_adds_up(large):
    _, law, _ = large
    bits = information(law)
    assert bits["I(Y;Z)"] + bits["I(Y;M|Z)"] == pytest.approx(bits["I(Y;Z,M)"])
    assert max(bits["I(Y;Z)"], bits["I(Y;M)"]) <= bits["I(Y;Z,M)"] + 1e-12 <= bits["H(Y)"] + 2e-12
    # By another way: the sum of p log p / (p q).
    joint = law.joint(False, True)
    ratio = joint / (joint.sum(0) * joint.sum(1, keepdims=True))
    assert np.sum(joint * np.log2(np.where(ratio > 0, ratio, 1))) == pytest.approx(bits["I(Y;M)"], abs=1e-9)


def test_limits_of_the_law():
    certain = information(bayes_model(SyntheticOptions(ambiguity=0)))
    assert certain["I(Y;Z)"] == pytest.approx(certain["H(Y)"]) and certain["I(Y;M|Z)"] == pytest.approx(0, abs=1e-9)
    mute = bayes_model(SyntheticOptions(metadata_signal=0))
    assert information(mute)["I(Y;M)"] == pytest.approx(0, abs=1e-9)
    people = pd.DataFrame(dict(age=[20., np.nan, 80], sex=["female", "", "male"], site=["face", "", "back"]))
    assert np.allclose(mute.posterior(None, people), mute.prior)
    blank = people.assign(age=np.nan, sex="", site="")
    law = bayes_model(SyntheticOptions())
    assert np.allclose(law.posterior(["mel"] * 3, blank), law.posterior(["mel"] * 3))
    assert np.allclose(law.posterior(None, blank), law.prior)


def test_two_classes_by_hand():
    law = bayes_model(SyntheticOptions(per_class=dict(mel=30, nv=90), ambiguity=.1))
    assert law.prior.tolist() == [.25, .75] and law.appearance.tolist() == [[.9, .1], [.1, .9]]
    assert law.posterior(["mel", "nv"])[:, 0] == pytest.approx([.225 / .3, .025 / .7])
    # A man's melanoma: .60 against .52 of nevi, odds 1 / 3.
    man = pd.DataFrame(dict(age=[np.nan], sex=["male"], site=[""]))
    assert law.posterior(None, man)[0, 0] == pytest.approx(.25 * .6 / (.25 * .6 + .75 * .52))
    assert law.posterior(["mel"], man)[0, 0] == pytest.approx(.225 * .6 / (.225 * .6 + .075 * .52))
    assert bayes_figures(law.joint(True, False))["accuracy"] == pytest.approx(.9)
    def entropy(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert information(law)["I(Y;Z)"] == pytest.approx(entropy(.25) - .3 * entropy(.75) - .7 * entropy(.025 / .7))


def test_one_person_stays_one_person(large):
    plan, _, _ = large
    assert (plan.groupby("lesion_id").patient_id.nunique() == 1).all()
    for column in ("age", "sex"):
        assert (plan.groupby("patient_id")[column].nunique(dropna=False) == 1).all()
    several = plan.groupby("patient_id").true_diagnosis.nunique()
    assert (several > 1).any() and (plan.groupby("patient_id").split.nunique() == 1).all()


def test_views_share_what_is_true_of_the_lesion():
    plan = plan_synthetic(n_images=2000, ambiguity=.3, skin_tones="range", views=2.5)
    for column in ("true_diagnosis", "appearance", "site", "age", "sex", "tone", "split", "patient_id"):
        assert (plan.groupby("lesion_id")[column].nunique(dropna=False) == 1).all(), column
    own = plan[plan.copy_of < 0]
    assert len(own) / own.lesion_id.nunique() == pytest.approx(2.5, abs=.05)
    assert (
        own.drop_duplicates("patient_id").tone.value_counts().reindex(TONES).min() > 0.9 * own.patient_id.nunique() / 6
    )


def test_stated_probabilities_are_those_of_the_table(faulty):
    data, true = faulty
    law = true.facts["model"]
    codes = law["codes"]
    for row in true.table.merge(data.table[["image_id", "age", "sex", "site"]], on="image_id").itertuples():
        weights = []
        for k, code in enumerate(codes):
            weight = law["prior"][k] * law["appearance"][k][codes.index(row.appearance)]
            for name in ("age", "sex", "site"):
                word = getattr(row, name)
                if word == word and word != "":
                    weight *= law[name]["probability"][k][law[name]["words"].index(word)]
            weights.append(weight)
        assert [getattr(row, f"bayes_{c}") for c in codes] == pytest.approx(np.array(weights) / sum(weights), abs=2e-6)


# ---- what is planted

def test_copies_are_copies(faulty):
    data, true = faulty
    planted = true.facts["planted"]["duplicates"]
    assert len(planted) == 30 and {d["transform"] for d in planted} == {"same", "recoded", *NEAR_KINDS}
    assert {(d["lesion"], d["split"]) for d in planted} == set(itertools.product(("same", "new"), ("same", "other")))
    table = data.table.set_index("image_id")
    for d in planted:
        copy = pixels(data, d["image_id"])
        original = pixels(data, d["original"])
        a = table.loc[d["image_id"]]
        b = table.loc[d["original"]]
        equal = copy.shape == original.shape and np.array_equal(copy, original)
        assert equal == (d["kind"] == "exact") == (d["transform"] in ("same", "recoded")), d
        assert (data.image_path(d["image_id"]).read_bytes() == data.image_path(d["original"]).read_bytes()) == (
            d["transform"] == "same"
        ), d
        assert (a.lesion_id == b.lesion_id) == (a.patient_id == b.patient_id) == (d["lesion"] == "same"), d
        assert (a.split == b.split) == (d["split"] == "same") and a.diagnosis == b.diagnosis, d
        assert a.duplicate_of == (d["original"] if (d["lesion"], d["split"]) == ("same", "same") else ""), d
        if d["kind"] == "near":
            again = alter(original, d["transform"])
            mask = read_mask(data.mask_path(d["image_id"]))
            assert copy.shape == again.shape and np.abs(copy.astype(int) - again).mean() < 6, d
            assert mask.shape == copy.shape[:2] and np.array_equal(
                mask, alter(read_mask(data.mask_path(d["original"])), d["transform"])
            ), d


def test_no_other_pictures_agree(faulty):
    data, true = faulty
    of = true.table.set_index("image_id").duplicate_of
    seen = {}
    for i in data.table.image_id:
        seen.setdefault(pixels(data, i).tobytes(), []).append(i)
    pairs = {frozenset(ids) for ids in seen.values() if len(ids) > 1}
    assert pairs == {
        frozenset((d["image_id"], d["original"])) for d in true.facts["planted"]["duplicates"] if d["kind"] == "exact"
    }
    assert (of != "").sum() == 30


def test_label_errors_are_listed_and_hidden(faulty):
    data, true = faulty
    planted = true.facts["planted"]
    lesions = true.table.merge(data.table, on="image_id")
    wrong = lesions[lesions.diagnosis != lesions.true_diagnosis]
    assert {e["lesion_id"]: e["true_diagnosis"] for e in planted["label_errors"]} == dict(
        zip(wrong.lesion_id, wrong.true_diagnosis)
    )
    assert sorted(itertools.chain(*(e["images"] for e in planted["label_errors"]))) == sorted(wrong.image_id)
    own = lesions[lesions.duplicate_of_x == ""]
    assert len(planted["label_errors"]) == round(.06 * own.lesion_id.nunique()) + 2
    for e in planted["label_errors"]:
        assert e["diagnosis"] in LOOKALIKES[e["true_diagnosis"]]
    torn = lesions.groupby("lesion_id").diagnosis.nunique()
    assert {e["lesion_id"] for e in planted["conflicting_lesions"]} == set(torn.index[torn > 1]) and (
        torn > 1
    ).sum() == 2
    assert not [c for c in data.table if "true" in c or c in ("appearance", "structures", "blend")]


def test_crossings_are_listed(faulty):
    data, true = faulty
    for unit, least in (("lesion", 2), ("patient", 3)):
        splits = data.table.groupby(f"{unit}_id").split.nunique()
        stated = true.facts["planted"][f"crossing_{unit}s"]
        assert {e[f"{unit}_id"] for e in stated} == set(splits.index[splits > 1]) and len(stated) >= least
        for e in stated:
            assert e["splits"] == sorted(set(data.table[data.table[f"{unit}_id"] == e[f"{unit}_id"]].split))


def test_severity_can_be_seen(faulty):
    data, true = faulty
    table = true.table
    rule = true.facts["planted"]["severity"]
    assert list(table.severity) == [sum(a >= t for t in rule["thresholds"]) for a in table.area]
    assert list(data.table.severity) == [str(s) for s in table.severity] and table.severity.nunique() == 4
    shown = [read_mask(data.mask_path(i)).mean() for i in table.image_id]
    assert np.corrcoef(np.log(shown), np.log(table.area))[0, 1] > .8


def test_artefacts_are_listed_and_in_the_pictures(faulty):
    data, true = faulty
    listed = true.facts["planted"]["artefacts"]
    for row in true.table.itertuples():
        names = set(row.artefacts.split("; ")) - {""}
        assert names == {name for name, images in listed.items() if row.image_id in images}
        assert read_mask(data.layer_path("artefacts", row.image_id)).any() == bool(names - {"cast"})


@pytest.mark.parametrize("name", ["ruler", "ink", "cast"])
@pytest.mark.parametrize("where", ["train", "all"])
def test_shortcut_stands_where_it_is_said(name, where):
    plan = plan_synthetic(
        n_images=6000, shortcut=name, shortcut_class="nv", shortcut_rate=0.7, shortcut_where=where, rates={name: 0.1}
    )
    for (split, code), rows in plan.groupby(["split", "true_diagnosis"]):
        wanted = .7 if code == "nv" and (split == "train" or where == "all") else .1
        assert abs(rows[name].mean() - wanted) <= 1 / len(rows) + .02, (split, code)


def test_shortcut_is_seen_in_training_only(tmp_path):
    data = make_synthetic(
        tmp_path / "a",
        per_class=dict(mel=15, nv=15),
        size=(48, 48),
        shortcut="cast",
        shortcut_rate=1.0,
        rates=dict(corners=0, hair=0),
    )
    colour = np.array([np.median(pixels(data, i)[~read_mask(data.mask_path(i))], 0) for i in data.table.image_id])
    orange = colour[:, 0] / colour[:, 2]
    tied = (data.table.diagnosis == "mel") & (data.table.split == "train")
    assert np.median(orange[tied]) > 1.2 * np.median(orange[~tied])
    planted = read_truth(data.root).facts["planted"]
    assert planted["shortcut"]["images"] == sorted(data.table.image_id[tied]) and planted["artefacts"]["corners"] == []


def test_skin_tone_is_the_stated_one(tmp_path):
    data = make_synthetic(
        tmp_path / "a",
        per_class=12,
        size=(48, 56),
        skin_tones="range",
        views=1,
        exact_duplicates=0,
        rates=dict(corners=0, hair=0),
    )
    table = read_truth(data.root).table.dropna(subset="ita_shown")
    assert len(table) > 70 and set(table.tone) == set(TONES)
    away = table.ita_shown - table.ita
    assert abs(away.median()) < 4 and away.abs().median() < 8, away.describe()  # lamp, cast and freckles do the rest
    assert table.ita.corr(table.ita_shown, method="spearman") > .95
    order = table.groupby("tone").ita_shown.median()[list(TONES)]
    assert order.is_monotonic_decreasing, order


# ---- the folder

def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(tmp_path):
    options = synthetic_options(per_class=dict(akiec=5, mel=5), size=(48, 48), near_duplicates=6, skin_tones="range")
    one, three, other = (
        make_synthetic(tmp_path / name, options, **more)
        for name, more in (("1", {}), ("3", dict(workers=3)), ("o", dict(seed=3)))
    )
    assert files(one.root) == files(three.root)
    assert files(one.root)["truth.csv"] != files(other.root)["truth.csv"]


def test_pictures_stay_when_copies_are_added(tmp_path):
    small = synthetic_options(per_class=dict(akiec=5, mel=5), size=(48, 48))
    plain, planted = (make_synthetic(tmp_path / name, small, near_duplicates=n) for name, n in (("p", 0), ("q", 5)))
    known = {p.read_bytes() for p in (planted.root / "images").iterdir()}
    assert all(p.read_bytes() in known for p in (plain.root / "images").iterdir())


def test_folder_reads_back(faulty):
    data, true = faulty
    again = read_dataset(data.root)
    assert len(again) == len(true.table) == true.facts["n_images"] and list(again.table.image_id) == list(
        true.table.image_id
    )
    assert (
        true.facts["recipe"]["label_errors"] == 0.06
        and synthetic_options(**true.facts["recipe"] | dict(size=(56, 64))) == FAULTY
    )
    for reader in READERS:
        for split, leaves in true.facts["realised"][reader].items():
            for leaf in leaves.values():
                assert leaf["low"] <= leaf["value"] <= leaf["high"] and leaf["n"] >= leaf["n_lesions"] > 0, (
                    reader,
                    split,
                )


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    draw = made._draw_lesion_files
    drawn = []
    def fail(task):
        if len(drawn) == 5:
            raise OSError("the lamp went out")
        drawn.append(1)
        return draw(task)
    monkeypatch.setattr(made, "_draw_lesion_files", fail)
    for workers in (1, 2):
        drawn.clear()
        with pytest.raises(OSError, match="the lamp went out"):
            make_synthetic(tmp_path / "a", per_class=4, size=(48, 64), workers=workers)
        assert list(tmp_path.iterdir()) == []


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and is no dataset folder"):
        make_synthetic(tmp_path, per_class=4, size=(48, 64))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options, message", [
    (dict(n_images=10), "n_images: 1 images of 'akiec'; at least 3"),
    (dict(skin_tones="dark"), "skin_tones is 'dark'; allowed are light, range"),
    (dict(duplicate_lesions="old"), "duplicate_lesions is 'old'; allowed are same, new, mixed"),
    (dict(near_duplicates=1.5), "near_duplicates is 1.5; choose a whole number"),
    (dict(conflicting_lesions=9999), "conflicting_lesions is 9999; there are only"),
    (dict(size=(64,)), r"size is \(64,\); choose"),
], ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_bad_options_are_named_and_write_nothing(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_synthetic(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    "Ten times the images, and no more than a few rows more in memory."
    code = (
        "import resource, sys; from skinlesion.synthetic.truth import make_synthetic; "
        "make_synthetic(sys.argv[1], n_images=int(sys.argv[2]), size=(48, 48)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    def peak_of(n):
        "MiB that drawing `n` images takes at its height, in a process of its own."
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / n), n], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    peak = [peak_of(n) for n in ("300", "3000")]
    assert peak[1] - peak[0] < 60, peak
