"""Time the import of a download of the ISIC archive, and how soon it refuses one that needs no pixels to be refused.

    python benchmarks/import_isic.py [--images 10000] [--size 160x120] [--rounds 3] [--refusals-only]

The download is made here: noise with a spot as JPEG, a metadata.csv of all columns that isic-cli writes, diagnoses
from the archive's vocabulary. Baseline, in the same run: every file is read, decoded with Pillow and written as it is.
The import also checks the table, cleans and measures every file, reads the folder back, flushes the disk and swaps the
folder in. Each refusal is a command in a process of its own; its baseline is a command that reads nothing but its
options, so the start of Python and of the command. Seconds are the least of the rounds, of the wall clock and of
the processor: where other work shares the cores, the second tell more.
Targets: 10,000 images in 60 s on 2 cores; each refusal in 3 s.
"""
import argparse
import csv
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from skinlesion.data.isic import import_isic
from skinlesion.data.vocabulary import archive_code, archive_diagnoses, archive_sites
from skinlesion.taxonomy import LABEL_SETS

HEADER = (
    "isic_id attribution copyright_license age_approx anatom_site_1 anatom_site_2 anatom_site_3 anatom_site_4 "
    "anatom_site_5 anatom_site_general concomitant_biopsy diagnosis_1 diagnosis_2 diagnosis_3 diagnosis_4 diagnosis_5 "
    "diagnosis_confirm_type fitzpatrick_skin_type image_type lesion_id melanocytic patient_id sex"
).split()


def levels(path):
    "The five levels of a path, empty where it has fewer."
    names = path.split(":")
    return [*names, *[""] * (5 - len(names))]


def row(k, diagnosis, site):
    "The cells of one image."
    licence = ("CC-0", "CC-BY", "CC-BY-NC")[k % 3]
    return [
        f"ISIC_{k:07}", f"Clinic {k % 7}", licence, 5 * (k % 17) + 5, *levels(site), "", "", *levels(diagnosis),
        "histopathology", "", "dermoscopic", f"IL_{k // 2:07}", "", f"IP_{k // 4:07}", ("female", "male")[k % 2],
    ]


def make(folder, n_images, size):
    "A download of the archive, all of whose diagnoses are of a class of isic2019."
    folder.mkdir()
    diagnoses = [path for path in archive_diagnoses() if archive_code(path, LABEL_SETS["isic2019"])]
    sites = archive_sites()
    rows = [row(k, diagnoses[k // 2 % len(diagnoses)], sites[k % len(sites)]) for k in range(n_images)]
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    width, height = size
    y, x = np.mgrid[:height, :width]
    spot = 80 * (((x - width / 2) ** 2 + (y - height / 2) ** 2) < (height / 3) ** 2)[..., None]
    for k, cells in enumerate(rows):
        noise = np.random.default_rng(k).integers(150, 220, (height, width, 3))
        Image.fromarray((noise - spot).astype(np.uint8)).save(folder / f"{cells[0]}.jpg", quality=90)
    return rows


def plain(folder, out):
    "Read, decode, write: what any script would do."
    out.mkdir()
    for path in sorted(folder.glob("*.jpg")):
        data = path.read_bytes()
        Image.open(io.BytesIO(data)).load()
        (out / path.name).write_bytes(data)


def processor_seconds():
    "Of the commands that have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(work):
    "Seconds of wall clock, and what the work gave."
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def edited(rows, k, column, word):
    "The rows with one cell changed, or without the column where `word` is None."
    at = HEADER.index(column)
    if word is None:
        return [[*cells[:at], *cells[at + 1:]] for cells in [HEADER, *rows]]
    return [HEADER, *([*cells[:at], word, *cells[at + 1:]] if i == k else cells for i, cells in enumerate(rows))]


def refusals(rows):
    "Name -> (table, further words of the command); each must fail before an image is read."
    good = [HEADER, *rows]
    last = len(rows) - 1
    return {
        "(nothing to read)": (good, ("--label-set", "isic2018")),
        "a diagnosis of no class": (edited(rows, last, "diagnosis_1", "Benignn"), ()),
        "no diagnosis_1": (edited(rows, last, "diagnosis_1", None), ()),
        "a site that is not known": (edited(rows, last, "anatom_site_1", "Elsewhere"), ()),
        "an impossible age": (edited(rows, last, "age_approx", "850"), ()),
        "an image given twice": (edited(rows, last, "isic_id", rows[0][0]), ()),
        "a row without an image": (edited(rows, last, "isic_id", "ISIC_9999999"), ()),
        "no image of that type": (good, ("--image-type", "RCM: tile")),
        "a type that is not known": (good, ("--image-type", "photo")),
        "a word to map that is nowhere": (good, ("--map", "freckle=nv")),
        "no table": (None, ()),
    }


def refuse(folder, rows, rounds):
    "Print how long each refusal takes; whether all of them are soon enough."
    slowest = 0
    for name, (table, words) in refusals(rows).items():
        if table is None:
            (folder / "metadata.csv").unlink()
        else:
            with open(folder / "metadata.csv", "w", newline="") as file:
                csv.writer(file).writerows(table)
        command = [sys.executable, "-m", "skinlesion.pipeline.cli", "import", "isic", str(folder), *words]
        command += ["--out", str(folder.parent / "no")]
        wall = []
        processor = []
        for _ in range(rounds):
            before = processor_seconds()
            seconds, done = timed(lambda: subprocess.run(command, capture_output=True, text=True))
            wall.append(seconds)
            processor.append(processor_seconds() - before)
            if done.returncode == 0 or (folder.parent / "no").exists():
                sys.exit(f"{name}: nothing was refused")
        slowest = max(slowest, min(wall))
        first = done.stderr.strip().splitlines()[0]
        print(f"{min(wall):5.2f} s wall, {min(processor):.2f} s processor  {name}: {first[:100]}", flush=True)
    print(f"slowest refusal {slowest:.2f} s; target 3 s: {'met' if slowest <= 3 else 'missed'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", default="160x120")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--refusals-only", action="store_true")
    options = parser.parse_args()
    size = tuple(map(int, options.size.split("x")))
    with tempfile.TemporaryDirectory(prefix="import_isic.") as scratch:
        scratch = Path(scratch)
        rows = make(scratch / "download", options.images, size)
        if not options.refusals_only:
            base, _ = timed(lambda: plain(scratch / "download", scratch / "plain"))
            wall, report = timed(lambda: import_isic(scratch / "download", scratch / "data"))
            print(f"plain read + Pillow decode + write: {base:.1f} s, {options.images} files of {options.size} pixels")
            print(f"import_isic: {wall:.1f} s, {report.n_images} images, {report.n_images / wall:.0f} images/s")
            print(f"ratio import / plain: {wall / base:.2f}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
                  f"target 60 s: {'met' if wall <= 60 else 'missed'}")
        refuse(scratch / "download", rows, options.rounds)


if __name__ == "__main__":
    main()
