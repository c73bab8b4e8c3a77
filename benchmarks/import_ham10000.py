"""Time the HAM10000 import against a plain unzip and decode of the same files.

    python benchmarks/import_ham10000.py [FOLDER]

FOLDER, or else the environment variable HAM10000, names the folder that holds HAM10000 as its publisher lays it out;
without either it is ../shared/data/ham10000, and where that is absent nothing is timed. Baseline, in the same run:
every image and mask is unzipped with `zipfile`, decoded with Pillow, and written as it is. The import also checks the
table, cleans and measures every file, reads the folder back, flushes the disk and swaps the folder in.
Target: 7,064 images with masks in 60 s on 2 cores.
"""
import io
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from PIL import Image
from skinlesion.data.collections import import_ham10000
from skinlesion.files import repo_root

def plain(archives, out):
    "Unzip, decode, write: what any script would do."
    count = 0
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir():
                    continue
                data = archive.read(entry)
                Image.open(io.BytesIO(data)).load()
                (out/Path(entry.filename).name).write_bytes(data)
                count += 1
    return count

def timed(work):
    "Seconds of wall clock and of processor time, and what the work gave."
    wall = time.perf_counter()
    cpu = time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result

def main():
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get('HAM10000')
    folder = Path(named) if named else repo_root().parent/'shared'/'data'/'ham10000'
    remedy = (
        f"{folder}: no such folder; name the one that holds HAM10000's archives and table: python "
        "benchmarks/import_ham10000.py FOLDER"
    )
    if folder.is_dir():
        with tempfile.TemporaryDirectory(prefix='import_ham10000.') as scratch:
            compare(folder, Path(scratch))
    elif named:
        sys.exit(remedy)
    else:
        print(f"skipped: {remedy}")

def compare(folder, scratch):
    "Both ways, one after the other, and the ratio."
    (scratch/'plain').mkdir()
    base, base_cpu, files = timed(lambda: plain(sorted(folder.glob('*.zip')), scratch/'plain'))
    wall, cpu, report = timed(lambda: import_ham10000(folder, scratch/'data'))
    print(
        f"plain unzip + Pillow decode + write: {base:.1f} s wall, {base_cpu:.1f} s processor, {files} "
        f"files, {files / base:.0f} files/s"
    )
    done = report.n_images + report.n_masks
    print(
        f"import_ham10000:                     {wall:.1f} s wall, {cpu:.1f} s processor, "
        f"{report.n_images} images and {report.n_masks} masks, "
        f"{report.n_images / wall:.0f} images/s, {done / wall:.0f} files/s"
    )
    print(
        f"ratio import / plain: {wall / base:.2f} wall, {cpu / base_cpu:.2f} processor; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
        f"target 60 s: {'met' if wall <= 60 else 'missed'}"
    )

if __name__ == '__main__':
    main()
