"""Images per second of the loader, against normalising the same images from memory.

    python benchmarks/loader.py [--images 512] [--size 128] [--policy medium] [--rounds 3]

The baseline walks a uint8 array in batches and normalises each: no augmentation, no store, no processes, so no loader that varies its
images reaches a ratio of 1. Images are made up. Best of the rounds; worker processes are started anew for each epoch, as in training.
"""
import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd

from skinlesion.data.datasets import LesionDataset, make_loader
from skinlesion.data.store import AUGMENT_POLICIES, build_store
from skinlesion.images import normalise, save_png
from skinlesion.taxonomy import get_label_set


def made_up(folder, n, size):
    """A store of `n` smooth pictures; 64 files stand for all of them."""
    rng = np.random.default_rng(0)
    for k in range(64):
        noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        save_png(cv2.GaussianBlur(noise, (0, 0), size / 20), folder / f'{k}.png')
    table = pd.DataFrame(dict(image_id=[f'img{i}' for i in range(n)], diagnosis=['mel', 'nv'] * (n // 2) + ['mel'] * (n % 2)))
    dataset = SimpleNamespace(table=table, image_path=lambda i: folder / f'{int(i[3:]) % 64}.png', mask_path=lambda i: None)
    return build_store(dataset, folder / 'store', size), table


def per_second(batches, n, rounds):
    """Images a second, the best of `rounds` walks; `batches(epoch)` yields an epoch."""
    best = float('inf')
    for epoch in range(rounds):
        start = time.perf_counter()
        for _ in batches(epoch): pass
        best = min(best, time.perf_counter() - start)
    return n / best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=512)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--policy', choices=AUGMENT_POLICIES, default='medium')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, table = made_up(Path(folder), args.images, args.size)
        memory = np.stack([store.image(i) for i in store.ids])
        chunks = [slice(s, s + args.batch_size) for s in range(0, args.images, args.batch_size)]
        rows = [('in memory, normalise only', '-', '-', per_second(lambda epoch: (normalise(memory[c]) for c in chunks), args.images, args.rounds))]
        for policy, workers in (('none', 0), (args.policy, 0), (args.policy, 2)):
            dataset = LesionDataset(store, table, get_label_set('ham10000'), augment=policy)
            load = lambda epoch: make_loader(dataset, args.batch_size, epoch, shuffle=True, workers=workers)
            rows.append(('make_loader', policy, workers, per_second(load, args.images, args.rounds)))
    result = pd.DataFrame(rows, columns=['what', 'policy', 'workers', 'images/s'])
    result['ratio'] = (result['images/s'] / result['images/s'][0]).round(3)
    result['ms/image'] = (1000 / result['images/s']).round(3)
    result['images/s'] = result['images/s'].round().astype(int)
    print(f"{args.images} images of {args.size}x{args.size}, batches of {args.batch_size}, best of {args.rounds}")
    print(result.to_string(index=False))


if __name__ == '__main__':
    main()
