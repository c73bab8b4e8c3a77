"""The image store under kill -9: the old store or the new one stands, and the next build ends in the same bytes.

And its content: the pictures of their files, after additions and changes, so evaluation and prediction agree.
"""
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
import torch
from PIL import Image

from skinlesion.colour import COLOURS, prepare_image
from skinlesion.data import store as module
from skinlesion.data.datasets import LesionDataset
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.data.store import ImageStore, append_store, build_store
from skinlesion.images import encode_png, normalise, read_image, read_mask, resize_mask
from skinlesion.model.bundle import Member, save_bundle
from skinlesion.model.inference import predict_probs
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set
from skinlesion.use.predict import Predictor
from skinlesion.views import VIEW_SETS, apply_view

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile", "tempfile.mkdtemp"}


def made(folder, ids, colour=0):
    "Write pictures of noise, two of three with a mask; the dataset of them."
    for i in ids:
        rng = np.random.default_rng([colour, *i.encode()])
        (folder / f"{i}.png").write_bytes(encode_png(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)))
        if ord(i[-1]) % 3:
            (folder / f"{i}.mask").write_bytes(encode_png(rng.random((12, 16)) > .5))
    return known(folder, ids)


def known(folder, ids):
    "The dataset of pictures that are there."
    def mask(i):
        return folder / f"{i}.mask" if (folder / f"{i}.mask").exists() else None
    return SimpleNamespace(
        table=pd.DataFrame({"image_id": list(ids)}), image_path=lambda i: folder / f"{i}.png", mask_path=mask
    )


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
                if event not in WRITES and not (event == "open" and set(str(args[1])) & set("wxa+")):
                    return
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
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
    return SimpleNamespace(
        dataset=dataset,
        folder=folder,
        whole=contents(build_store(dataset, folder / "whole", 8, shard_images=3).root),
        grown=contents(grow(folder, folder / "grown")),
    )


def grow(folder, out):
    "A store of seven images to which the others are added."
    build_store(known(folder, IDS[:7]), out, 8, shard_images=3)
    return append_store(out, known(folder, IDS), shard_images=3).root


def check_images(store, dataset, colour="none"):
    "Every image and mask of a store is what its file gives."
    for i in store.ids:
        assert (store.image(i) == prepare_image(read_image(dataset.image_path(i)), store.size, colour)).all()
        mask = dataset.mask_path(i)
        if mask is None:
            assert store.mask(i) is None
        else:
            assert (store.mask(i) == resize_mask(read_mask(mask), store.size)).all()


def build_killed(eleven, folder, at):
    "A build over an older store, killed at write `at`, a second killed later, then a third; False once no kill came."
    out = folder / "out"
    work = folder / "work"
    build_store(known(eleven.folder, IDS[:2]), out, 8)
    old = contents(out)
    def build():
        return build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3)
    struck = killed(build, at)
    if out.exists():
        assert contents(out) in (old, eleven.whole)
    if at % 3 == 0:
        killed(build, at + 2)
    assert contents(build().root) == eleven.whole
    assert [p.name for p in folder.iterdir() if p.name not in ("out", "work")] == [] and len(list(work.iterdir())) == 4
    return struck


def append_killed(eleven, folder, at):
    "An addition killed at write `at`: the old store or the new one is there, and the next addition ends in the new."
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
        if not series(eleven, folder, at):
            break
    assert at > least


def test_killed_between_images(eleven, tmp_path):
    "After any image: the finished shards are taken up, and the progress says so."
    for stop in (1, 5, 8):
        work = tmp_path / f"work{stop}"
        seen = []
        def die(done, total):
            if done == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        assert killed(
            lambda: build_store(eleven.dataset, tmp_path / "out", 8, work_dir=work, shard_images=3, progress=die), -1
        )
        build_store(
            eleven.dataset,
            tmp_path / "out",
            8,
            work_dir=work,
            shard_images=3,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert contents(tmp_path / "out") == eleven.whole
        taken_up = stop // 3 * 3 # whole shards of three
        assert (
            seen[0] == (min(3, taken_up) or 1, 11)
            and seen[-1] == (11, 11)
            and len(seen) == taken_up // 3 + 11 - taken_up
        )


def test_killed_from_outside(eleven, tmp_path):
    "A process of its own, killed while it decodes."
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import "
        "test_store as t; from skinlesion.data import store\n"
        "def slowly(*a, real=store._prepare_one): time.sleep(.05); return real(*a)\n"
        "store._prepare_one = slowly; folder, out = map(Path, sys.argv[2:])\n"
        "store.build_store(t.known(folder, t.IDS), out / 'out', 8, work_dir=out / 'work', "
        "shard_images=3, workers=1,\n"
        "                  progress=lambda done, total: print(done, flush=True))"
    )
    args = [os.path.dirname(__file__), str(eleven.folder), str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 8:
            break
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert sum((p / "SHA256SUMS").exists() for p in (tmp_path / "work").iterdir()) == 2
    assert (
        contents(build_store(eleven.dataset, tmp_path / "out", 8, work_dir=tmp_path / "work", shard_images=3).root)
        == eleven.whole
    )


@pytest.mark.parametrize("colour", COLOURS)
def test_same_bytes(tmp_path, colour):
    "One go, other threads, kept shards, other kept shards of the same images: one set of bytes."
    dataset = made(tmp_path, IDS)
    whole = contents(build_store(dataset, tmp_path / "out", 9, shard_images=4, colour=colour).root)
    for how in (
        dict(workers=1),
        dict(workers=7),
        dict(work_dir=tmp_path / "w"),
        dict(work_dir=tmp_path / "w", workers=3),
    ):
        assert contents(build_store(dataset, tmp_path / "out", 9, shard_images=4, colour=colour, **how).root) == whole
    store = ImageStore(tmp_path / "out", verify=True)
    assert store.colour == colour and store.ids == IDS
    check_images(store, dataset, colour)


def test_every_flipped_byte_is_noticed(eleven, tmp_path):
    "A byte of any file of a kept shard: the shard is built anew."
    work = tmp_path / "work"
    out = tmp_path / "out"
    build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3)
    for shard in sorted(work.iterdir()):
        for path in sorted(shard.iterdir()):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
            assert contents(build_store(eleven.dataset, out, 8, work_dir=work, shard_images=3).root) == eleven.whole, (
                path
            )


def test_every_flipped_byte_of_a_store_is_noticed(eleven, tmp_path):
    "A byte of any file of the store itself: an error that names the file or the folder."
    for name, data in eleven.whole.items():
        folder = tmp_path / name
        folder.mkdir()
        for other, content in eleven.whole.items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        )
        with pytest.raises(ValueError, match=name if name != "SHA256SUMS" else "SHA256SUMS|index"):
            ImageStore(folder, verify=True)


def test_stale_sources(tmp_path):
    "Pictures changed under their names between two builds: the second holds the new ones."
    dataset = made(tmp_path, IDS)
    work = tmp_path / "work"
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
    dataset = SimpleNamespace(
        table=pd.DataFrame({"image_id": ids}), image_path=lambda i: None, mask_path=lambda i: None
    )
    store = build_store(dataset, tmp_path / "many", 8, shard_images=700)
    assert store.ids == ids and store.table.height.tolist() == [int(i.split("-")[0]) + 1 for i in ids]
    for row in rng.integers(0, 5000, 300).tolist():
        value = int(ids[row].split("-")[0])
        assert store.position(ids[row]) == row and store.original_size(ids[row]) == (value + 1, 7)
        assert (store.image(ids[row]) == value % 251).all()
    for absent in ("", "0", "5000-", ids[7] + "x", ids[7][:-1] + "~", "é"):
        with pytest.raises(ValueError, match="is not in the store"):
            store.position(absent)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("steps", [(1, 2, 11), (4, 11), (3, 6, 9, 11)])
def test_every_image_after_additions(tmp_path, steps, colour):
    "However a store grew, every image and mask is that of its file, and of a store built in one go."
    dataset = made(tmp_path, IDS)
    out = tmp_path / "out"
    rng = np.random.default_rng(len(steps))
    shuffled = [IDS[k] for k in rng.permutation(len(IDS))]
    store = build_store(known(tmp_path, shuffled[:steps[0]]), out, 9, colour=colour, shard_images=2)
    for workers, end in enumerate(steps[1:], 1):
        store = append_store(store, known(tmp_path, shuffled[:end]), workers=workers, shard_images=1 + workers)
    assert store.ids == shuffled and store.colour == colour
    check_images(ImageStore(out, verify=True), dataset, colour)
    whole = build_store(known(tmp_path, shuffled), tmp_path / "whole", 9, colour=colour)
    assert all(
        (store.image(i) == whole.image(i)).all() and store.original_size(i) == whole.original_size(i) for i in IDS
    )
    assert [store.position(i) for i in shuffled] == list(range(11)) and store.table.equals(whole.table)


@pytest.mark.parametrize("changed", ["image", "mask", "mask gone", "mask new", "swapped", "Pillow", "OpenCV", "code"])
def test_a_stale_shard_is_never_used(tmp_path, monkeypatch, changed):
    "Whatever changed since a shard was kept, the store is that of a build without them; stale images are decoded."
    dataset = made(tmp_path, IDS)
    work = tmp_path / "work"
    decoded = []
    build_store(dataset, tmp_path / "out", 8, work_dir=work, shard_images=3)
    with_mask = next(i for i in IDS if ord(i[-1]) % 3)
    without = next(i for i in IDS if not ord(i[-1]) % 3)
    other = encode_png(np.full((12, 16, 3), 7, np.uint8))
    outline = encode_png(np.eye(12, 16) > 0)
    first, second = (tmp_path / f"{i}.png" for i in IDS[:2])
    if changed == "image":
        first.write_bytes(other)
    if changed == "mask":
        (tmp_path / f"{with_mask}.mask").write_bytes(outline)
    if changed == "mask gone":
        (tmp_path / f"{with_mask}.mask").unlink()
    if changed == "mask new":
        (tmp_path / f"{without}.mask").write_bytes(outline)
    if changed == "swapped":
        bytes_of_first = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(bytes_of_first)
    if changed in ("Pillow", "OpenCV"):
        monkeypatch.setattr({"Pillow": module.PIL, "OpenCV": module.cv2}[changed], "__version__", "0.0")
    if changed == "code":
        monkeypatch.setattr(module, "_code_digest", lambda: "another")
    def counted(job, recipe, real=module._prepare_one):
        decoded.append(job[0])
        return real(job, recipe)
    monkeypatch.setattr(module, "_prepare_one", counted)
    store = build_store(dataset, tmp_path / "out", 8, work_dir=work, shard_images=3)
    assert len(decoded) == (11 if changed in ("Pillow", "OpenCV", "code") else 3)
    check_images(store, dataset)
    assert contents(store.root) == contents(build_store(dataset, tmp_path / "fresh", 8, shard_images=3).root)


def photographs(folder):
    "Wide JPEGs, some turned by their EXIF, and the table that goes with them."
    for k in range(6):
        noise = np.random.default_rng(k).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(cv2.resize(noise, (70, 50), interpolation=cv2.INTER_CUBIC))
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3)[k % 3]  # orientation
        image.save(folder / f"p{k}.jpg", quality=85, exif=exif)
    table = pd.DataFrame(
        dict(
            image_id=[f"p{k}" for k in range(6)],
            diagnosis=["mel", "nv"] * 3,
            age=[30.0, np.nan, 61.0] * 2,
            sex=["female", "", "male"] * 2,
            site=["back", "", "face"] * 2,
        )
    )
    return SimpleNamespace(table=table, image_path=lambda i: folder / f"{i}.jpg", mask_path=lambda i: None)


@pytest.mark.parametrize("views", VIEW_SETS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_prediction_is_what_evaluation_measured(tmp_path, colour, views):
    "A file through `Predictor` gets the probabilities that evaluation gets from the store; views are averaged."
    dataset = photographs(tmp_path)
    labels = get_label_set("ham10000")
    encoder = MetadataEncoder.fit(dataset.table)
    store = build_store(dataset, tmp_path / "store", 32, colour=colour)
    models = {
        "image": create_model("test_resnet", 7, seed=0),
        "fused": create_model("test_resnet", 7, encoder.dim, "concat", seed=1),
    }
    members = [Member(name, model.eval(), {}) for name, model in models.items()]
    predictor = Predictor(
        save_bundle(tmp_path / "bundle", members, labels, encoder, 32, {}, colour=store.colour, views=views)
    )
    said = predictor.predict_many([dataset.image_path(i) for i in store.ids], dataset.table)[
        [f"p_{c}" for c in labels.codes]
    ].to_numpy()

    evaluated = np.mean(
        [predict_probs(m, LesionDataset(store, dataset.table, labels, encoder), views=views) for m in models.values()],
        axis=0,
    )
    np.testing.assert_allclose(said, evaluated, atol=1e-6)
    images = torch.stack([normalise(store.image(i)) for i in store.ids])
    values = torch.from_numpy(encoder.encode(dataset.table))
    with torch.inference_mode():
        by_view = [
            m(apply_view(images, v), values).double().softmax(1).numpy()
            for v in VIEW_SETS[views]
            for m in models.values()
        ]
    np.testing.assert_allclose(said, np.mean(by_view, axis=0), atol=1e-6)
    assert np.ptp(said, axis=0).max() > 1e-3  # the pictures do get different answers
