"""Splits on many random tables: what must hold for each, against a slow and simple account of what belongs together.

A few seeds are fixed; the long series (`slow`) takes others of the same kind.
"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skinlesion.data.splits import (
    APART,
    SPLITS,
    check_split,
    hash_deviation,
    inject_leak,
    make_folds,
    split_changes,
    split_groups,
    split_table,
    tied_groups,
)
from skinlesion.data.splits import _decided, _drawn  # the two steps of `stratified`, taken apart

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 24))]
SIDE = dict(train="train", unlabelled="train", valid="valid", test="test", external="external")
PINNED = dict(lesion_id=["train", "valid", "test", "valid", "train", "test", "test"],
              patient_id=["test", "valid", "test", "train", "train", "train", "train"])  # of seed 7
AWAY = dict(column="source", values=["clinic"], tied="aside")


def random_table(seed, patients=True, unlabelled=True, twins=True):
    "Rows in random order and pairs of duplicates: several images a lesion, several lesions a patient, missing ids."
    rng = np.random.default_rng([seed, 7])
    n = int(rng.integers(60, 260))
    lesions = rng.integers(0, n * 2 // 3, n)
    kind = rng.choice(["mel", "nv", "df", "bkl"], n, p=[.2, .5, .12, .18])[lesions]
    table = pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in rng.permutation(n)],
            lesion_id=[f"L{x}" for x in lesions],
            patient_id=[f"P{x}" for x in rng.integers(0, n, n)[lesions]],
            diagnosis=kind,
            age=rng.choice([*range(0, 90, 5), np.nan], n)[lesions],
            site=rng.choice(["back", "face", "foot", "hand", ""], n)[lesions],
            source=np.where(rng.random(n)[lesions] < 0.1, "clinic", "home"),
        ),
        index=rng.permutation(n) + 1000,
    )
    table.loc[table.lesion_id == table.lesion_id.iloc[0], "source"] = "clinic"
    if not patients:
        table["patient_id"] = ""
    if unlabelled:
        table.loc[rng.random(n) < .15, "diagnosis"] = ""
    for column in ("lesion_id", "patient_id"):
        table.loc[rng.random(n) < .1, column] = ""
    some = rng.choice(table.image_id, (2, n // 25))
    return table, pd.DataFrame(dict(image_id_a=some[0], image_id_b=some[1])) if twins else None


def groups_by_hand(table, pairs):
    "The group of each image: labels spread over shared ids and pairs until nothing changes."
    others = [] if pairs is None else [*pairs.image_id_a, *pairs.image_id_b]
    label = {i: k for k, i in enumerate(dict.fromkeys([*table.image_id, *others]))}
    ties = [
        list(rows.image_id) for column in ("lesion_id", "patient_id") for word, rows in table.groupby(column) if word
    ]
    ties += [] if pairs is None else [[a, b] for a, b in zip(pairs.image_id_a, pairs.image_id_b)]
    while True:
        before = dict(label)
        for tie in ties:
            least = min(label[i] for i in tie)
            for i in tie:
                label[i] = least
        if label == before:
            return np.array([label[i] for i in table.image_id])


def cut(table, pairs, policy, **more):
    "A split, or None where the table cannot have one, which the error must say in the words for it."
    try:
        return (
            make_folds(table, 3, 3, pairs)
            if policy == "folds"
            else split_groups(table, policy, pairs=pairs, seed=3, **more)
        )
    except ValueError as error:
        assert any(words in str(error) for words in ("fewer lesions than", "has no image in")), error
        return None


@pytest.mark.parametrize("seed", SEEDS)
def test_groups(seed):
    "Shared lesions, patients and duplicates tie, through each other too, and nothing else does."
    table, pairs = random_table(seed)
    for given in (None, pairs):
        found = tied_groups(table, given)
        wanted = groups_by_hand(table, given)
        assert len(set(zip(found, wanted))) == len(set(found)) == len(set(wanted))


@pytest.mark.parametrize("policy", ["stratified", "hash", "column", "folds"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_group_crosses(seed, policy):
    "No group is on two sides, no unlabelled image in a held-out group; only external images are external."
    table, pairs = random_table(seed)
    if policy == "folds":
        table = table[table.diagnosis != ""]
        fold = cut(table, pairs, "folds")
        if fold is None:
            return
        assert fold.groupby(groups_by_hand(table, pairs)).nunique().max() == 1
        assert (pd.crosstab(table.diagnosis, fold) > 0).all(axis=None) and fold.index.equals(table.index)
        return
    if policy == "column":
        table["split"] = cut(table, pairs, "stratified")
        if table["split"].isna().all():
            return
    for more in (dict(), dict(external=AWAY)):
        split = cut(table, pairs, policy, **more)
        if split is None:
            continue
        assert split.index.equals(table.index) and set(split) <= {*SPLITS, *APART}
        groups = groups_by_hand(table, pairs)
        bare = table.diagnosis == ""
        assert split.map(SIDE).groupby(groups).nunique().max() == 1  # `aside` is NaN here, on no side
        outside = (table.source == "clinic") if more else np.zeros(len(table), bool)
        held = np.isin(groups, groups[split.isin(["valid", "test", "external"]) | outside])
        assert not (split[bare].isin([*SPLITS, "external"])).any() and not (split[~bare] == "unlabelled").any()
        assert (split[bare & held] == "aside").all() and (
            policy == "hash" or (split[bare & ~held] == "unlabelled").all()
        )
        tied = np.isin(groups, groups[outside])
        assert ((split == "external") == (outside & ~bare)).all() and (split[tied & ~outside] == "aside").all()
        assert (pd.crosstab(table.diagnosis[split.isin(SPLITS)], split)[list(SPLITS)] > 0).all(axis=None)


@pytest.mark.parametrize("seed", SEEDS)
def test_row_order_is_irrelevant(seed):
    "Shuffled rows, shuffled pairs, the same parts."
    table, pairs = random_table(seed)
    other = table.sample(frac=1, random_state=seed)
    turned = pairs[::-1].rename(columns=dict(image_id_a="image_id_b", image_id_b="image_id_a"))
    for policy in ("stratified", "hash"):
        split = cut(table, pairs, policy)
        if split is not None:
            assert split_groups(other, policy, pairs=turned, seed=3).loc[table.index].equals(split)
    some = table[table.diagnosis != ""]
    folds = cut(some, pairs, "folds")
    if folds is not None:
        assert (
            cut(other.loc[[i for i in other.index if i in some.index]], turned, "folds").loc[some.index].equals(folds)
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_previous_never_moves(seed):
    "Over three generations old images stay, new ones of an old group join it, and a gone one is reported."
    table, _ = random_table(seed, unlabelled=False, twins=False)
    rng = np.random.default_rng(seed)
    groups = groups_by_hand(table, None)
    known = None
    age = rng.integers(0, 3, len(table))
    gone = rng.random(len(table)) < .1
    for now in range(3):
        here = table[(age <= now) & ~(gone & (age < now))]
        try:
            split = split_groups(here, seed=now, previous=known)
        except ValueError as error:  # where an image that joined two groups has come, or a class is too small yet
            assert any(
                w in str(error) for w in ("stand on two sides", "has no image in split", "fewer lesions than")
            ), error
            if "two sides" in str(error):
                sides = (
                    known.assign(group=pd.Series(groups, table.image_id)[known.image_id].to_numpy())
                    .groupby("group")
                    .split.nunique()
                )
                assert sides.max() > 1
            return
        if known is not None:
            was = known.set_index("image_id").split
            after = pd.Series(split.to_numpy(), here.image_id)
            both = [i for i in was.index if i in after.index]
            assert (after[both] == was[both]).all()
            changes = split_changes(here, split, known).set_index("image_id").change
            assert set(changes[changes == "gone"].index) == set(was.index) - set(after.index)
            assert set(changes) <= {"kept", "gone", "joined", "dealt"} and set(changes[changes == "kept"].index) == set(
                both
            )
        known = here.assign(split=split)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_link_between_old_groups(seed):
    "Two groups in different parts that turn out to be one are an error naming both; in one part they are none."
    table, _ = random_table(seed, unlabelled=False, twins=False)
    split = cut(table, None, "stratified")
    if split is None:
        return
    previous = split_table(table, split)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        a, b = rng.choice(len(table), 2, replace=False)
        pair = pd.DataFrame(dict(image_id_a=[table.image_id.iloc[a]], image_id_b=[table.image_id.iloc[b]]))
        if split.iloc[a] == split.iloc[b]:
            assert split_groups(table, previous=previous, pairs=pair).equals(split)
        else:
            with pytest.raises(ValueError, match="1 group.*stand on two sides") as error:
                split_groups(table, previous=previous, pairs=pair)
            assert all(
                f"{split.iloc[k]} in previous" in str(error.value) for k in (a, b)
            ) and "Correct the link" in str(error.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_duplicates_of_old_images_join_them(seed):
    "A duplicate of an old image, directly or through others, takes its part; what is old stays; nothing crosses."
    table, _ = random_table(seed, unlabelled=False, twins=False)
    split = cut(table, None, "stratified")
    if split is None:
        return
    rng = np.random.default_rng(seed)
    old = rng.choice(len(table), 8, replace=False)
    new = pd.DataFrame(
        [
            dict(image_id=f"new{k}{step}", lesion_id="", patient_id="", diagnosis=table.diagnosis.iloc[k])
            for k in old
            for step in "ab"
        ]
    )
    ends = [(f"new{k}b", f"new{k}a") for k in old] + [
        (f"new{k}a", table.image_id.iloc[k]) for k in old
    ] # b is tied through a alone
    pairs = pd.DataFrame(ends, columns=["image_id_a", "image_id_b"])
    grown = pd.concat([table, new], ignore_index=True)
    for other in (3, 4):
        parts = split_groups(grown, seed=other, previous=split_table(table, split), pairs=pairs)
        assert (parts[:len(table)].to_numpy() == split.to_numpy()).all()
        assert parts[len(table):].tolist() == [split.iloc[k] for k in old for _ in "ab"]
        check_split(grown.assign(split=parts), pairs)
    changes = split_changes(grown, parts, split_table(table, split), pairs).set_index("image_id").change
    assert set(changes[new.image_id]) == {"joined"} and set(changes[table.image_id]) == {"kept"}


def test_hash_never_changes():
    "Parts by name: whoever changes the rule moves the images of all who rely on it."
    names = ["a", "b", "c", "ISIC_0024306", "HAM_0000118", "patient 7", "Ü"]
    filler = pd.DataFrame(
        dict(image_id=[f"x{k}" for k in range(60)], lesion_id=[f"x{k}" for k in range(60)], diagnosis="nv")
    )
    ids = dict(image_id=[f"i{k}" for k in range(7)], diagnosis="nv")
    for column, wanted in PINNED.items():
        split = split_groups(
            pd.concat([pd.DataFrame(ids | {column: names}), filler], ignore_index=True), "hash", seed=7
        )
        assert split[:7].tolist() == wanted, column


@pytest.mark.parametrize("seed", SEEDS)
def test_hash_needs_no_memory(seed):
    "Images stay when others come and go or a diagnosis is added; another seed moves them."
    table, pairs = random_table(seed)
    full = cut(table, pairs, "hash")
    if full is None:
        return
    alone = table.assign(patient_id="")  # groups are lesions, so half of the table holds half of each group or all
    whole = cut(alone, None, "hash")
    half = alone.sample(frac=.7, random_state=seed)
    part = cut(half, None, "hash")
    if whole is not None and part is not None:
        assert part.equals(whole[half.index])
    named = cut(alone.assign(diagnosis=alone.diagnosis.replace("", "nv")), None, "hash")
    if whole is not None and named is not None:
        kept = alone.diagnosis != ""
        assert named[kept].equals(whole[kept]) and (named[~kept] == "train").equals(whole[~kept] == "unlabelled")
    more = pd.concat(
        [table, table.iloc[:9].assign(image_id=[f"j{k}" for k in range(9)], lesion_id=[f"K{k}" for k in range(9)])],
        ignore_index=True,
    )
    grown = cut(more, pairs, "hash")
    assert grown is not None and (grown[:len(table)].to_numpy() == full.to_numpy()).all()


def test_hash_thresholds():
    "10,000 lesions follow the fractions to within four standard deviations; a larger train keeps its lesions."
    table = pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in range(10_000)],
            lesion_id=[f"L{k}" for k in range(10_000)],
            diagnosis=["nv", "mel"] * 5_000,
        )
    )
    parts = {share: split_groups(table, "hash", fractions=(share, .9 - share, .1)) for share in (.5, .6)}
    for share, split in parts.items():
        found = hash_deviation(table, split, (share, .9 - share, .1))
        assert (found.difference.abs() < 4 * found.sd).all() and np.isclose(
            found.sd.xs("all").loc["test"], (0.09 / 10_000) ** 0.5
        )
    assert (parts[.6][parts[.5] == "train"] == "train").all() and parts[.5].eq("test").equals(parts[.6].eq("test"))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_of_each_class_in_each_part(seed):
    "Without patients three lesions of a class are enough, always; two are an error that names the class."
    rng = np.random.default_rng(seed)
    sizes = {"mel": 3, "nv": 3 + int(rng.integers(0, 40)), "df": 3 + int(rng.integers(0, 4))}
    rows = [(f"{c}{k}", c) for c, count in sizes.items() for k in range(count) for _ in range(rng.integers(1, 6))]
    table = pd.DataFrame(rows, columns=["lesion_id", "diagnosis"]).assign(
        image_id=lambda t: [f"i{k}" for k in range(len(t))]
    )
    fractions = rng.dirichlet([4, 2, 2]).clip(.05)
    split = split_groups(table, fractions=tuple(fractions / fractions.sum()), seed=seed)
    assert (pd.crosstab(table.diagnosis, split) > 0).all(axis=None)
    assert (pd.crosstab(table.diagnosis, make_folds(table, 3, seed)) > 0).all(axis=None)
    for bad in (split_groups, lambda t: make_folds(t, 3)):
        with pytest.raises(ValueError, match=r"class 'mel' has 2 lesion\(s\): fewer lesions than"):
            bad(table[table.lesion_id != "mel0"])
    with pytest.raises(ValueError, match=r"class 'mel' has 3 lesion\(s\) tied by patients or duplicates into 2"):
        twins = [table.image_id[table.lesion_id == f"mel{k}"].iloc[0] for k in (0, 1)]
        split_groups(table, pairs=pd.DataFrame([twins], columns=["image_id_a", "image_id_b"]))


@pytest.mark.parametrize("seed", SEEDS)
def test_sites_and_ages_never_harm_the_classes(seed):
    "The second step of `stratified` changes no class count; the class shares are off by at most the largest lesion."
    table, pairs = random_table(seed)
    full = cut(table, pairs, "stratified")
    if full is None:
        return
    rows = table.sort_values("image_id")
    plain = _drawn(rows, "stratified", (.7, .15, .15), 3, _decided(rows, pairs, None, None), secondary=False)
    before = np.isin(plain, SPLITS)
    after = full.isin(SPLITS)
    assert pd.crosstab(rows.diagnosis[before], plain[before]).equals(
        pd.crosstab(table.diagnosis[after], full[after].to_numpy())
    )
    single, _ = random_table(seed, patients=False, unlabelled=False, twins=False)
    one = single.groupby("lesion_id").diagnosis.transform("nunique").le(1) | (single.lesion_id == "")
    single = single[one]
    found = hash_deviation(single, split_groups(single))
    largest = single[single.lesion_id != ""].lesion_id.value_counts().max()
    assert (found.drop("all", level=0).difference.abs() * found.drop("all", level=0).images <= largest + 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_planted_crossing_is_found(seed):
    "Move one image of a group to another side: the check names what crosses, and the policy `column` refuses it."
    table, pairs = random_table(seed)
    split = cut(table, pairs, "stratified")
    if split is None:
        return
    check_split(table.assign(split=split), pairs)
    groups = groups_by_hand(table, pairs)
    rng = np.random.default_rng(seed)
    live = split.isin(["train", "valid", "test"])
    several = [k for k in np.flatnonzero(live) if (groups[live] == groups[k]).sum() > 1]
    for k in rng.choice(several, 5):
        moved = split.copy()
        moved.iloc[k] = {"train": "test", "valid": "train", "test": "valid"}[split.iloc[k]]
        with pytest.raises(ValueError, match="cross splits"):
            check_split(table.assign(split=moved), pairs)
        with pytest.raises(ValueError, match="cross splits"):
            split_groups(table.assign(split=moved), "column", pairs=pairs)


def test_words_of_other_people():
    "The policy `column` reads val, validation and testing in any case, and says what it does not know."
    table = pd.DataFrame(dict(image_id=list("abcdef"), lesion_id=list("abcdef"), diagnosis=["mel"] * 3 + ["nv"] * 3))
    for words in (["train", "val", "test"], ["Training", "Validation", "Testing"], [" TRAIN ", "valid", "test"]):
        assert split_groups(table.assign(split=words * 2), "column").tolist() == [*SPLITS] * 2
    more = pd.concat([table, table[:3].assign(image_id=list("xyz"), lesion_id=list("xyz"))]).assign(
        split=[*SPLITS] * 2 + [*APART]
    )
    assert split_groups(more, "column")[6:].tolist() == [*APART]
    with pytest.raises(
        ValueError, match=r"row 3 \(image 'b'\): split 'vaild' is not one of train, valid, test. Did you mean 'valid'"
    ):
        split_groups(table.assign(split=["train", "vaild", "test"] * 2), "column")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leak_is_all_that_differs(seed):
    "Same test, validation and class counts in training; no lesion crosses in one, the marked ones in the other."
    table, _ = random_table(seed, patients=False, unlabelled=False, twins=False)
    split = cut(table, None, "stratified", fractions=(.6, .1, .3))
    if split is None:
        return
    try:
        leak = inject_leak(table, split, seed=seed)
        part = inject_leak(table, split, share=.5, seed=seed)
    except ValueError as error:
        assert "none can stand in" in str(error) or "no lesion has more than one image in test" in str(error)
        return
    check_split(table.assign(split=leak.clean))
    for found in (leak, part):
        for name in ("valid", "test"):
            assert (found.clean == name).equals(found.leaked == name)
        counts = [table.diagnosis[found[kind] == "train"].value_counts().to_dict() for kind in ("clean", "leaked")]
        assert counts[0] == counts[1]
        lesion = table.lesion_id.where(table.lesion_id != "", table.image_id)
        trained = set(lesion[found.leaked == "train"])
        sizes = [
            sorted(table[found[kind] == "train"].groupby(["diagnosis", lesion[found[kind] == "train"]]).size())
            for kind in ("clean", "leaked")
        ]
        assert sizes[0] == sizes[1] and len(trained) == lesion[found.clean == "train"].nunique()
        assert found.sibling.equals((found.clean == "test") & lesion.isin(trained))
        assert not found.sibling[lesion.isin(set(lesion[found.clean == "train"]))].any()
        new = (found.leaked == "train") & (found.clean != "train")
        assert (split[new] == "test").all() and not lesion[(found.clean == "test")].duplicated().any()
        assert (
            inject_leak(table.sample(frac=1, random_state=1), split, share=0.5, seed=seed).loc[table.index].equals(part)
        )
    assert part.clean.equals(leak.clean) and 0 < part.sibling.sum() <= leak.sibling.sum()


def test_splits_csv(tmp_path):
    "A written split serves as `previous`."
    table, pairs = random_table(2)
    split = split_groups(table, pairs=pairs, external=AWAY)
    assert set(split) == {*SPLITS, *APART}
    path = tmp_path / "splits.csv"
    split_table(table, split).to_csv(path, index=False)
    assert split_groups(table, seed=8, pairs=pairs, external=AWAY, previous=path).equals(split)


def words_of():
    "One text of all that is drawn for a table."
    table, pairs = random_table(4)
    plain = random_table(4, patients=False, unlabelled=False, twins=False)[0]
    drawn = [
        split_groups(table, pairs=pairs),
        cut(table, pairs, "hash"),
        make_folds(plain, 3),
        inject_leak(plain, split_groups(plain)).leaked,
    ]
    return " ".join(str(word) for series in drawn if series is not None for word in series)


def test_the_same_in_another_process():
    "Nothing depends on the hash seed of the interpreter."
    code = ("import sys; sys.path.insert(0, 'tests'); from test_splits import words_of; print(words_of())")
    env = os.environ | {"PYTHONHASHSEED": "123"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == words_of()
