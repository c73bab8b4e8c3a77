"""Time every metric with its interval against a loop over scikit-learn.

    python benchmarks/metrics.py [--images 10000] [--resamples 1000] [--timed 20] [--many 1000000]

A made-up table of predictions for seven classes, four images of three lesions on average, goes through `scorecard`:
every metric of the whole, of each class and of malignancy, in every lesion resample, checks and leaves included.
Baseline, in the same run: scikit-learn on the rows that a resample draws, one call for each metric it has and none
twice (AUROC and average precision of all classes in one call each, sensitivity, PPV and F1 in one), `timed` of the
resamples, scaled up to all. scikit-learn has no calibration error and only half of the pAUC, so the loop computes
fewer metrics than the scorecard does. Each part runs in a process of its own, so that its peak memory is its own;
seconds are those of the clock, and of the processor where others keep it busy. Targets: at least 50 times as fast as
the loop, 15 s, 1 GiB; a million predictions without intervals in 10 s.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd

from skinlesion.stats.intervals import walk_leaves
from skinlesion.stats.metrics import malignancy_masks
from skinlesion.stats.resamples import Resamples
from skinlesion.taxonomy import get_label_set

HAM = get_label_set("ham10000")
COMMON = (.033, .051, .110, .011, .111, .670, .014)
MALIGNANT, _ = malignancy_masks(HAM)


def table(n):
    "Targets, probabilities and lesions of n images."
    rng = np.random.default_rng(0)
    targets = rng.choice(7, n, p=COMMON)
    logits = rng.normal(size=(n, 7)) + 2 * np.eye(7)[targets]
    probs = np.exp(logits)
    return targets, probs / probs.sum(1, keepdims=True), rng.integers(0, n * 3 // 4, n)


def score(n, resamples):
    "The scorecard of n images."
    from skinlesion.evaluate.scorecard import scorecard
    from skinlesion.taxonomy import probability_columns
    targets, probs, lesions = table(n)
    ids = [f"i{i:07d}" for i in range(n)]
    predictions = pd.DataFrame(probs, columns=probability_columns(HAM)).assign(image_id=ids)
    labels = pd.DataFrame(
        dict(image_id=ids, diagnosis=np.array(HAM.codes)[targets], lesion_id=[f"l{i}" for i in lesions])
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    cpu = time.process_time()
    card = scorecard(predictions, labels, HAM, n_resamples=resamples)
    return dict(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, leaves=len(list(walk_leaves(card))),
                peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before=before / 1024)


def by_sklearn(targets, probs):
    "Every metric of the scorecard that scikit-learn has, no call twice."
    from sklearn import metrics as sk
    call = probs.argmax(1)
    hot = np.eye(7)[targets]
    malignant = MALIGNANT[targets]
    suspicion = probs[:, MALIGNANT].sum(1).clip(max=1)
    flagged = suspicion >= .5
    whole = (
        sk.accuracy_score(targets, call),
        sk.balanced_accuracy_score(targets, call),
        sk.top_k_accuracy_score(targets, probs, k=2),
        sk.matthews_corrcoef(targets, call),
        sk.cohen_kappa_score(targets, call),
        sk.log_loss(targets, probs),
        sk.brier_score_loss(targets, probs),
    )
    classes = (sk.roc_auc_score(hot, probs, average=None), sk.average_precision_score(hot, probs, average=None),
               sk.precision_recall_fscore_support(targets, call), sk.multilabel_confusion_matrix(targets, call),
               [sk.brier_score_loss(targets == c, probs[:, c]) for c in range(7)])
    binary = (
        sk.roc_auc_score(malignant, suspicion),
        sk.average_precision_score(malignant, suspicion),
        sk.roc_curve(malignant, suspicion),
        sk.roc_auc_score(~malignant, -suspicion, max_fpr=0.2),
        sk.brier_score_loss(malignant, suspicion),
        sk.log_loss(malignant, suspicion),
        sk.precision_recall_fscore_support(malignant, flagged),
        sk.matthews_corrcoef(malignant, flagged),
        sk.confusion_matrix(malignant, flagged),
    )
    return whole, classes, binary


def loop(n, resamples, timed):
    "Seconds of the loop, from `timed` of its resamples."
    targets, probs, lesions = table(n)
    for k, weight in enumerate(Resamples(lesions, timed + 1).weights[1:]):
        if k == 1:
            # the first call imports and compiles
            start = time.perf_counter()
            cpu = time.process_time()
        rows = np.repeat(np.arange(n), weight)
        by_sklearn(targets[rows], probs[rows])
    return dict(
        seconds=(time.perf_counter() - start) * resamples / timed, cpu=(time.process_time() - cpu) * resamples / timed
    )


def apart(*args):
    "The result of a part of this script in a process of its own."
    done = subprocess.run(
        [sys.executable, __file__, "--part", *map(str, args)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        warnings.simplefilter("ignore")
        return print(json.dumps({"score": score, "loop": loop}[args.part[0]](*map(int, args.part[1:]))))
    ours = apart("score", args.images, args.resamples)
    theirs = apart("loop", args.images, args.resamples, args.timed)
    ratio = theirs["seconds"] / ours["seconds"]
    def verdict(met):
        return "met" if met else "MISSED"
    def taken(part):
        return f"{part['seconds']:.2f} s, {part['cpu']:.2f} s processor"
    def memory(part):
        return f"peak {part['peak']:.0f} MiB, {part['before']:.0f} before it began"
    print(f"scorecard, {args.images} x 7, {args.resamples} lesion resamples, {ours['leaves']} leaves: {taken(ours)} "
          f"(15 s: {verdict(ours['seconds'] <= 15)}); {memory(ours)} (1 GiB: {verdict(ours['peak'] <= 1024)})")
    print(f"scikit-learn, one call for each metric: {taken(theirs)}, scaled up from {args.timed} resamples")
    print(f"ratio {ratio:.0f}, {theirs['cpu'] / ours['cpu']:.0f} processor (50: {verdict(ratio >= 50)})")
    if args.many:
        many = apart("score", args.many, 0)
        print(
            f"scorecard, {args.many} x 7 without intervals: {taken(many)} (10 s: "
            f"{verdict(many['seconds'] <= 10)}); {memory(many)}"
        )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
