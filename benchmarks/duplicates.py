"""Seconds, growth and memory of the duplicate search, and what it finds of planted copies.

    python benchmarks/duplicates.py [--sizes 1000 10000 100000] [--lesions 300] [--copies 300] [--seed 2]

Growth: made pictures (a blob on textured skin, some behind a round aperture, 96x72 pixels, about half a millisecond
each), one in a hundred of them a copy of another, are fingerprinted as images are and searched from a memory map by a
separate process. Baseline, in the same run and up to 10^4: the neighbours among all hashes instead of those in the
cells (`cells` and `all pairs` in the table, in seconds).
Recall: copies of drawn lesions (skinlesion.synthetic.draw, 200x150), each kind planted among 10^4 pictures; a false
pair is a reported pair whose two images were not made from one original. Seed 1 served to set the thresholds and seed 2
to look for faults, so measure on another.
Targets: 10^4 in 30 s on 2 cores, growth below n^1.2, recall 95 %, false pairs below 1 % of those reported.
"""
import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from skinlesion.audit import duplicates
from skinlesion.audit.duplicates import ORIENTATIONS, find_duplicates, fingerprint, invariant_hash, orient_image
from skinlesion.synthetic.draw import synthesise
from skinlesion.stats.intervals import wilson_interval

Y, X = np.mgrid[-1:1:72j, -1.33:1.33:96j].astype(np.float32)


def made_picture(rng):
    "A blob on skin, (72,96,3) uint8: cheap, and as alike as dermatoscopic images are."
    def noise(rows):
        return cv2.resize(
            rng.standard_normal((rows, rows * 4 // 3), dtype=np.float32), (96, 72), interpolation=cv2.INTER_CUBIC
        )
    wide = noise(4)
    middle = noise(9)
    fine = noise(24) + .5 * noise(48)
    y, x = rng.normal(0, .12, 2)
    tall, broad = rng.uniform(.25, .7) * np.exp(rng.normal(0, .15, 2))
    inside = 1 - np.hypot((Y - y) / tall, (X - x) / broad) + rng.uniform(.05, .3) * middle + .1 * wide
    body = np.clip(inside / rng.uniform(.1, .5), 0, 1)
    light = 1 + .06 * wide + .02 * middle + rng.uniform(.01, .04) * fine
    dark = body * rng.uniform(.25, .75) * (1 + .25 * noise(6) + rng.uniform(.05, .3) * fine)
    if rng.random() < .15:
        light *= np.clip((rng.uniform(1.1, 1.4) - np.hypot(Y, X)) * 12, .05, 1)
    grey = light * (1 - np.clip(dark, 0, .95)) * rng.uniform(150, 225)
    return np.clip(grey[..., None] * rng.uniform((.95, .7, .65), (1.05, .85, .85)), 0, 255).astype(np.uint8)


def jpeg(image, quality=70):
    "The image as it comes back from a JPEG file."
    data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def resized(image, scale=.8):
    "The image at another size."
    return cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def cropped(image, rng, keep=.95):
    "A window of `keep` of each side, anywhere."
    h, w = image.shape[:2]
    rows = round(h * keep)
    columns = round(w * keep)
    top = rng.integers(h - rows + 1)
    left = rng.integers(w - columns + 1)
    return image[top:top + rows, left:left + columns]


def rimless(image, rim=.05):
    "The image without `rim` of it at each side."
    y = round(image.shape[0] * rim)
    x = round(image.shape[1] * rim)
    return image[y:-y, x:-x]


def brighter(image, factor):
    "All values times `factor`, cut off at 255."
    return np.clip(np.round(image.astype(np.float32) * factor), 0, 255).astype(np.uint8)


def changed_in_every_way(image, rng):
    "A crop, resized, brighter or darker, in any orientation, as JPEG 70."
    small = resized(cropped(image, rng))
    return jpeg(orient_image(brighter(small, rng.uniform(.9, 1.1)), int(rng.integers(8))))


COPIES = {
    name: partial(lambda image, rng, k: orient_image(image, k), k=k) for k, name in enumerate(ORIENTATIONS) if k
} | {
    "JPEG 70": lambda image, rng: jpeg(image),
    "resize 0.8": lambda image, rng: resized(image),
    "crop to 95 % of each side": cropped,
    "5 % off all four sides": lambda image, rng: rimless(image),
    "brightness +10 %": lambda image, rng: brighter(image, 1.1),
    "brightness -10 %": lambda image, rng: brighter(image, 0.9),
    "crop, resize, brightness, turn, JPEG": changed_in_every_way,
}


def made_fingerprints(path, n, seed):
    "Fingerprints of `n` made pictures in a .npy file, the last hundredth of them copies; the number of copies."
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (n, fingerprint(made_picture(np.random.default_rng(0))).size))
    copies = n // 100
    for i in range(n):
        original = i if i < n - copies else i - (n - copies)
        picture = made_picture(np.random.default_rng([seed, original]))
        if original != i:
            picture = changed_in_every_way(picture, np.random.default_rng([seed, i]))
        out[i] = fingerprint(picture)
    out.flush()
    return copies


def search(path):
    "In a process of its own: wall and processor seconds, extra memory, pairs, planted pairs found."
    prints = np.load(path, mmap_mode="r")
    n = len(prints)
    copies = len(prints) // 100
    ids = [f"{i:07d}" for i in range(n)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall = time.perf_counter()
    cpu = time.process_time()
    pairs = find_duplicates(ids, ids, prints)
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    planted = (pairs.image_id_b.astype(int) - pairs.image_id_a.astype(int)) == n - copies
    return dict(
        n=n,
        seconds=wall,
        processor=cpu,
        MB=memory,
        planted=copies,
        found=int(planted.sum()),
        false=int((~planted).sum()),
    )


def all_pairs(path):
    "The baseline, in a process of its own: candidates from distances between all hashes; seconds."
    prints = np.load(path, mmap_mode="r")
    start = time.perf_counter()
    thumbs = duplicates._unpack_thumbnails(prints)
    codes = invariant_hash(thumbs)
    for s in range(0, len(codes), 1024):
        for k in range(len(duplicates._WINDOWS)):
            away = 2 - 2 * invariant_hash(duplicates._window(thumbs[s:s + 1024], k)) @ codes.T
            np.argpartition(away, duplicates._NEIGHBOURS, axis=1)[:, :duplicates._NEIGHBOURS]
    return time.perf_counter() - start


def in_cells(path):
    "What the baseline is compared with: hashes, cells and queries; seconds."
    prints = np.load(path, mmap_mode="r")
    start = time.perf_counter()
    index = duplicates._build_index(prints, np.arange(len(prints)))
    for s in range(0, len(prints), 1024):
        thumbs = index.thumbs(np.arange(s, min(s + 1024, len(prints))))
        for k in range(len(duplicates._WINDOWS)):
            duplicates._nearest(index, invariant_hash(duplicates._window(thumbs, k)))
    return time.perf_counter() - start


def apart(work, path):
    "The result of `work(path)` from a fresh process."
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (path,))


def growth(folder, sizes, seed):
    "Print the table of sizes and the fitted exponent."
    rows = []
    for n in sizes:
        path = str(folder / f"{n}.npy")
        start = time.perf_counter()
        made_fingerprints(path, n, seed)
        row = apart(search, path) | {"making": time.perf_counter() - start}
        row["making"] -= row["seconds"]
        if n <= 10_000:
            row |= {"cells": apart(in_cells, path), "all pairs": apart(all_pairs, path)}
        rows.append(row)
        print(f"  {n} done", flush=True)
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False))
    if len(rows) > 1:
        for what in ("seconds", "processor"):
            print(f"{what} grow as n^{np.polyfit(np.log(table.n), np.log(table[what]), 1)[0]:.2f}; from size to size "
                  + ", ".join(f"n^{v:.2f}" for v in np.diff(np.log(table[what])) / np.diff(np.log(table.n))))
    return table


def recall(lesions, copies, others, seed):
    "Print recall of each kind of copy and the false pairs, over `lesions` drawn ones among made pictures."
    codes = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    images = [synthesise(codes[i % 7], np.random.default_rng([seed, i]), (150, 200)).image for i in range(lesions)]
    base = np.stack(
        [fingerprint(x) for x in images]
        + [fingerprint(made_picture(np.random.default_rng([seed, 1, i]))) for i in range(others)]
    )
    names = [f"{i:07d}" for i in range(len(base))]
    rows = []
    rng = np.random.default_rng(seed)
    for kind, change in COPIES.items():
        some = rng.choice(lesions, min(copies, lesions), replace=False)
        made = np.stack([fingerprint(change(images[i], rng)) for i in some])
        ids = names + [f"{i:07d} copy" for i in some]
        pairs = find_duplicates(ids, ids, np.concatenate([base, made]))
        true = pairs.image_id_b == pairs.image_id_a + " copy"
        turned = pairs.orientation[true] == kind if kind in ORIENTATIONS else None
        low, high = wilson_interval(true.sum() / len(some), len(some))
        rows.append(
            dict(
                copy=kind,
                planted=len(some),
                found=int(true.sum()),
                recall=true.sum() / len(some),
                low=low,
                high=high,
                oriented="" if turned is None else f"{turned.mean():.3f}",
                false=int((~true).sum()),
            )
        )
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    wrong = table.false.sum()
    reported = table.false.sum() + table.found.sum()
    low, high = wilson_interval(wrong / reported, reported)
    print(
        f"false pairs: {wrong} of {reported} reported, {wrong / reported:.2%} ({low:.2%} to "
        f"{high:.2%}); lowest recall {table.recall.min():.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--lesions", type=int, default=300)
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--others", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; seed {args.seed}")
    if args.sizes:
        with tempfile.TemporaryDirectory(prefix="duplicates.") as folder:
            growth(Path(folder), args.sizes, args.seed)
    if args.lesions:
        recall(args.lesions, args.copies, args.others, args.seed)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
