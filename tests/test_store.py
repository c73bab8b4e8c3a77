"The image store under kill -9: whatever moment it struck, the old store or the new one stands, and the next build ends in the same bytes."
import os
import signal
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from skinlesion.colour import COLOURS, prepare_image
from skinlesion.data import store as module
from skinlesion.data.store import ImageStore, append_store, build_store
from skinlesion.images import encode_png, read_image, read_mask, resize_mask

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile", "tempfile.mkdtemp"}


def made(folder, ids, colour=0):
    "Write pictures of noise, two of three with a mask; the dataset of them."
    for i in ids:
        rng = np.random.default_rng([colour, *i.encode()])
        (folder / f"{i}.png").write_bytes(encode_png(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)))
        if ord(i[-1]) % 3: (folder / f"{i}.mask").write_bytes(encode_png(rng.random((12, 16)) > .5))
    return known(folder, ids)


def known(folder, ids):
    "The dataset of pictures that are there."
    def mask(i): return folder / f"{i}.mask" if (folder / f"{i}.mask").exists() else None
    return SimpleNamespace(table=pd.DataFrame({"image_id": list(ids)}), image_path=lambda i: folder / f"{i}.png", mask_path=mask)


def contents(folder):
    "Name -> bytes of the files of a folder."
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def killed(work, at, seconds=60):
    "Run `work` in a child that kills itself at write number `at`, counted from 1; whether it came to that."
    pid = os.fork()
    if pid == 0:
        try:
            count = 0
            def hook(event, args):
                nonlocal count
                if event not in WRITES and not (event == "open" and set(str(args[1])) & set("wxa+")): return
                count += 1
                if count == at: os.kill(os.getpid(), signal.SIGKILL)
            cv2.setNumThreads(0)
            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"the child did not end in {seconds} s")
        time.sleep(.002)
    assert done[1] in (0, signal.SIGKILL), done
    return done[1] == signal.SIGKILL


IDS = [f"i{k:02}" for k in range(11)]


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    "A dataset, and its store built in one go."
    folder = tmp_path_factory.mktemp("eleven")
    dataset = made(folder, IDS)
    return SimpleNamespace(dataset=dataset, folder=folder, whole=contents(build_store(dataset, folder / "whole", 8, shard_images=3).root),
                           grown=contents(grow(folder, folder / "grown")))


def grow(folder, out):
    "A store of seven images to which the others are added."
    build_store(known(folder, IDS[:7]), out, 8, shard_images=3)
    return append_store(out, known(folder, IDS), shard_images=3).root


def check_images(store, dataset, colour="none"):
    "Every image and mask of a store is what its file gives."
    for i in store.ids:
        assert (store.image(i) == prepare_image(read_image(dataset.image_path(i)), store.size, colour)).all()
        mask = dataset.mask_path(i)
        if mask is None: assert store.mask(i) is None
        else: assert (store.mask(i) == resize_mask(read_mask(mask), store.size)).all()


def build_killed(eleven, folder, at):
    "A build over an older store, killed at write `at`, then a second one killed a little later, then a third; False once no kill came."
    out, work = folder / "out", folder / "work"
    build_store(known(eleven.folder, IDS[:2]), out, 8)
    old = contents(out)
    def build(): return build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3)
    struck = killed(build, at)
    if out.exists(): assert contents(out) in (old, eleven.whole)
    if at % 3 == 0: killed(build, at + 2)
    assert contents(build().root) == eleven.whole
    assert [p.name for p in folder.iterdir() if p.name not in ("out", "work")] == [] and len(list(work.iterdir())) == 4
    return struck


def append_killed(eleven, folder, at):
    "An addition killed at write `at`: the old store or the new one is there at once, and the next addition ends in the new one."
    out = folder / "out"
    build_store(known(eleven.folder, IDS[:7]), out, 8, shard_images=3)
    struck = killed(lambda: append_store(out, eleven.dataset, shard_images=3), at)
    assert ImageStore(out, verify=True).ids in (IDS[:7], IDS)
    check_images(ImageStore(out), eleven.dataset)
    after = append_store(out, eleven.dataset, shard_images=3)
    assert after.ids == IDS and contents(out) == eleven.grown
    check_images(after, eleven.dataset)
    return struck


@pytest.mark.parametrize("at", [3, 9, 14, 22, 30])
def test_killed_build(eleven, tmp_path, at):
    "Some moments of a build."
    build_killed(eleven, tmp_path, at)


@pytest.mark.parametrize("at", [2, 7, 11, 14])
def test_killed_append(eleven, tmp_path, at):
    "Some moments of an addition."
    append_killed(eleven, tmp_path, at)


@pytest.mark.slow
@pytest.mark.parametrize("series, least", [(build_killed, 30), (append_killed, 12)], ids=["build", "append"])
def test_killed_at_every_write(eleven, tmp_path, series, least):
    "Every moment at which something is written, renamed or removed."
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        if not series(eleven, folder, at): break
    assert at > least


def test_killed_between_images(eleven, tmp_path):
    "After any image: the finished shards are taken up, and the progress says so."
    for stop in (1, 5, 8):
        work, seen = tmp_path / f"work{stop}", []
        def die(done, total):
            if done == stop: os.kill(os.getpid(), signal.SIGKILL)
        assert killed(lambda: build_store(eleven.dataset, tmp_path / "out", 8, work_dir=work, shard_images=3, progress=die), -1)
        build_store(eleven.dataset, tmp_path / "out", 8, work_dir=work, shard_images=3, progress=lambda done, total: seen.append((done, total)))
        assert contents(tmp_path / "out") == eleven.whole
        taken_up = stop // 3 * 3 # whole shards of three
        assert seen[0] == (min(3, taken_up) or 1, 11) and seen[-1] == (11, 11) and len(seen) == taken_up // 3 + 11 - taken_up


def test_killed_from_outside(eleven, tmp_path):
    "A process of its own, killed while it decodes."
    code = ("import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_store as t; from skinlesion.data import store\n"
            "def slowly(*a, real=store._prepare_one): time.sleep(.05); return real(*a)\n"
            "store._prepare_one = slowly; folder, out = map(Path, sys.argv[2:])\n"
            "store.build_store(t.known(folder, t.IDS), out / 'out', 8, work_dir=out / 'work', shard_images=3, workers=1,\n"
            "                  progress=lambda done, total: print(done, flush=True))")
    args = [os.path.dirname(__file__), str(eleven.folder), str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 8: break
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert sum((p / "SHA256SUMS").exists() for p in (tmp_path / "work").iterdir()) == 2
    assert contents(build_store(eleven.dataset, tmp_path / "out", 8, work_dir=tmp_path / "work", shard_images=3).root) == eleven.whole


@pytest.mark.parametrize("colour", COLOURS)
def test_same_bytes(tmp_path, colour):
    "One go, other threads, kept shards, other kept shards of the same images: one set of bytes."
    dataset = made(tmp_path, IDS)
    whole = contents(build_store(dataset, tmp_path / "out", 9, shard_images=4, colour=colour).root)
    for how in (dict(workers=1), dict(workers=7), dict(work_dir=tmp_path / "w"), dict(work_dir=tmp_path / "w", workers=3)):
        assert contents(build_store(dataset, tmp_path / "out", 9, shard_images=4, colour=colour, **how).root) == whole
    store = ImageStore(tmp_path / "out", verify=True)
    assert store.colour == colour and store.ids == IDS
    check_images(store, dataset, colour)


def test_every_flipped_byte_is_noticed(eleven, tmp_path):
    "A byte of any file of a kept shard: the shard is built anew."
    work, out = tmp_path / "work", tmp_path / "out"
    build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3)
    for shard in sorted(work.iterdir()):
        for path in sorted(shard.iterdir()):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
            assert contents(build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3).root) == eleven.whole, path


def test_every_flipped_byte_of_a_store_is_noticed(eleven, tmp_path):
    "A byte of any file of the store itself: an error that names the file or the folder."
    for name, data in eleven.whole.items():
        folder = tmp_path / name
        folder.mkdir()
        for other, content in eleven.whole.items(): (folder / other).write_bytes(content)
        (folder / name).write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:])
        with pytest.raises(ValueError, match=name if name != "SHA256SUMS" else "SHA256SUMS|index"): ImageStore(folder, verify=True)


def test_stale_sources(tmp_path):
    "Pictures changed under their names between two builds: the second holds the new ones."
    dataset, work = made(tmp_path, IDS), tmp_path / "work"
    build_store(dataset, tmp_path / "out", 8, work_dir=work, shard_images=3)
    made(tmp_path, IDS[4:6], colour=1)
    store = build_store(dataset, tmp_path / "out", 8, work_dir=work, shard_images=3)
    check_images(store, dataset)


def test_many_rows(tmp_path, monkeypatch):
    "A look-up among many ids of many lengths and letters, in many shards, is that of a dictionary."
    def quick(job, recipe):
        value = int(job[0].split("-")[0])
        return np.full((8, 8, 3), value % 251, np.uint8), None, (job[0], value + 1, 7, False, bytes(32))
    monkeypatch.setattr(module, "_prepare_one", quick)
    rng = np.random.default_rng(0)
    ids = [f"{k}-{'äöü-_ .x'[k % 8] * (k % 5)}" for k in rng.permutation(5000).tolist()]
    dataset = SimpleNamespace(table=pd.DataFrame({"image_id": ids}), image_path=lambda i: None, mask_path=lambda i: None)
    store = build_store(dataset, tmp_path / "many", 8, shard_images=700)
    assert store.ids == ids and store.table.height.tolist() == [int(i.split("-")[0]) + 1 for i in ids]
    for row in rng.integers(0, 5000, 300).tolist():
        value = int(ids[row].split("-")[0])
        assert store.position(ids[row]) == row and store.original_size(ids[row]) == (value + 1, 7)
        assert (store.image(ids[row]) == value % 251).all()
    for absent in ("", "0", "5000-", ids[7] + "x", ids[7][:-1] + "~", "é"):
        with pytest.raises(ValueError, match="is not in the store"): store.position(absent)
