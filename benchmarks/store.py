"""The image store against doing without it: building, reading, and the memory that its size costs.

    python benchmarks/store.py [--images 512] [--size 224] [--workers 2] [--rounds 5] [--rows 1000 10000 100000]

build   images per second of `build_store` from 600x450 JPEGs with masks, against decoding and resizing the same files
        by the same functions on one core, times the workers. A round measures both, one after the other, and the ratio
        is the median over the rounds, so that other work on the machine affects both alike. Everything is in the
        build: hashing, masks, writing, syncing to the disk, the index. The wall clock decides. On a busy machine a
        second thread gets no second core; so the processor time, what the build spends beyond the decoding, is shown
        beside it and decides nothing. A verdict counts only where `quiet` is true (a load of at most 1 before).
read    images per second of `ImageStore.image` in random order, against decoding and resizing.
memory  a process of its own opens a store of 10^3, 10^4, 10^5 rows and reads 2,000 of its images: memory that is its
        own (RssAnon: all but mapped files), seconds to open it, and the same for building it (pictures of 16x16 pixels
        from 64 files).
The pictures are made up: smooth noise with detail, saved as JPEG of quality 90 (about 50 kB each).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd

from skinlesion.colour import prepare_image
from skinlesion.data.store import ImageStore, build_store
from skinlesion.images import encode_png, read_image, read_mask, resize_mask


def made_up(folder, n, shape=(450, 600), files=32, suffix='jpg'):
    """A dataset of `n` images with masks; a few files stand for all of them."""
    rng = np.random.default_rng(0)
    for k in range(files):
        coarse = [
            rng.integers(0, 256, (max(2, shape[0] // s), max(2, shape[1] // s), 3), dtype=np.uint8)
            for s in (150, 20, 4)
        ]
        noise = [cv2.resize(small, shape[::-1]) for small in coarse]
        image = np.clip(sum(n * w for n, w in zip(noise, (.6, .3, .1))), 0, 255).astype(np.uint8)
        data = (
            cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            if suffix == 'jpg'
            else encode_png(image)
        )
        (folder / f'{k}.{suffix}').write_bytes(data)
        (folder / f'{k}.mask.png').write_bytes(encode_png(image[..., 0] > 128))
    table = pd.DataFrame({'image_id': [f'ISIC_{i:07}' for i in range(n)]})
    def place(kind):
        return lambda i: folder / f'{int(i[5:]) % files}.{kind}'
    return SimpleNamespace(table=table, image_path=place(suffix), mask_path=place('mask.png'))


def seconds(work, clock=time.perf_counter):
    """Seconds of a call: by the wall, or by the processor."""
    start = clock()
    work()
    return clock() - start


def by_hand(dataset, size, masks=True):
    """Decode and resize every image and mask, one after the other, and keep nothing."""
    for i in dataset.table.image_id:
        prepare_image(read_image(dataset.image_path(i)), size)
        if masks:
            resize_mask(read_mask(dataset.mask_path(i)), size)


def build_and_read(args, folder):
    """Rows of the result, rates and ratios of building and reading; and the verdict."""
    dataset = made_up(folder, args.images)
    n = args.images
    order = np.random.default_rng(1).permutation(dataset.table.image_id).tolist()
    by_hand(dataset, args.size)
    rounds = []
    for _ in range(args.rounds):
        alone = n / seconds(lambda: by_hand(dataset, args.size))
        build = n / seconds(lambda: build_store(dataset, folder / 'store', args.size, workers=args.workers))
        kept = n / seconds(
            lambda: build_store(
                dataset, folder / 'other', args.size, workers=args.workers, work_dir=folder / f'work{len(rounds)}'
            )
        )
        again = n / seconds(
            lambda: build_store(
                dataset, folder / 'other', args.size, workers=args.workers, work_dir=folder / f'work{len(rounds)}'
            )
        )
        spent = [n / seconds(work, time.process_time) for work in (lambda: by_hand(dataset, args.size),
                 lambda: build_store(dataset, folder / 'store', args.size, workers=args.workers))]
        store = ImageStore(folder / 'store')
        decode = n / seconds(lambda: by_hand(dataset, args.size, masks=False))
        read = n / seconds(lambda: [store.image(i) for i in order])
        rounds.append(
            dict(
                alone=alone,
                build=build,
                kept=kept,
                again=again,
                cpu_alone=spent[0],
                cpu_build=spent[1],
                decode=decode,
                read=read,
            )
        )
    rate = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    def ratio(a, b, by=1):
        return statistics.median(r[a] / r[b] / by for r in rounds)
    built = ratio('build', 'alone', args.workers)
    spent = ratio('cpu_build', 'cpu_alone')
    faster = ratio('read', 'decode')
    verdict = {
        'benchmark': 'store',
        'x_cores': round(built, 3),
        'target_x_cores': 0.9,
        'x_decode': round(faster, 1),
        'target_x_decode': 5,
        'workers': args.workers,
        'rounds': args.rounds,
        'met': built >= 0.9 and faster >= 5,
        'x_cores_processor': round(spent, 3),
    }
    rows = [
        ('one core: decode and resize image and mask', rate['alone'], 1.0, ''),
        (f'build_store, {args.workers} workers', rate['build'], built, f'of {args.workers} x one core; target 0.9'),
        ('the same in processor time', rate['cpu_build'], spent, 'of one core; beside the verdict, no part of it'),
        (
            'build_store with work_dir',
            rate['kept'],
            ratio('kept', 'alone', args.workers),
            f'of {args.workers} x one core',
        ),
        ('build_store from kept shards', rate['again'], ratio('again', 'alone'), 'x one core'),
        ('one core: decode and resize image', rate['decode'], 1.0, ''),
        ('ImageStore.image', rate['read'], faster, 'x decode and resize; target 5'),
    ]
    return rows, verdict


CHILD = """
import sys, time, json, numpy as np, pandas as pd
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import store as bench
from skinlesion.data.store import ImageStore, build_store
def own(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
folder, n, what = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
before = own()
if what == 'build':
    dataset = bench.made_up(folder, n, (16, 16), 64, 'png')
    before = own()
    start = time.perf_counter()
    build_store(dataset, folder / f'store{n}', 16)
else:
    start = time.perf_counter()
    store = ImageStore(folder / f'store{n}')
took = time.perf_counter() - start
if what == 'open':
    for k in np.random.default_rng(0).integers(0, n, 2000): store.image(f'ISIC_{k:07}')
memory = dict(own_mib=round(own(), 1), grew_mib=round(own() - before, 2))
print(json.dumps(dict(rows=n, what=what, seconds=round(took, 4)) | memory))
"""


def memory(args, folder):
    """What the number of rows costs, a process for each."""
    for n in args.rows:
        for what in ('build', 'open'):
            done = subprocess.run(
                [sys.executable, '-c', CHILD, os.path.dirname(os.path.abspath(__file__)), str(folder), str(n), what],
                capture_output=True,
                text=True,
                check=True,
            )
            yield json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(images=512, size=224, workers=2, rounds=5).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--rows', type=int, nargs='*', default=[1000, 10_000, 100_000])
    args = parser.parse_args()
    cv2.setNumThreads(1)
    load = os.getloadavg()[0]
    if load > 1:
        print(f'warning: the load is {load:.1f} before the benchmark starts; other work makes the ratios unreliable')
    with tempfile.TemporaryDirectory() as folder:
        rows, verdict = build_and_read(args, Path(folder))
        result = pd.DataFrame(rows, columns=['what', 'images/s', 'ratio', 'against'])
        print(f'{args.images} JPEGs of 600x450, size {args.size}, median of {args.rounds} rounds')
        print(result.round({'images/s': 0, 'ratio': 2}).to_string(index=False), flush=True)
        machine = {
            'quiet': load <= 1,
            'cores': os.cpu_count(),
            'load_before': round(load, 1),
            'load_after': round(os.getloadavg()[0], 1),
        }
        print(json.dumps(verdict | machine), flush=True)
        for row in memory(args, Path(folder)):
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
