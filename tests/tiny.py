"A bundle of two untrained members and a few pictures: what they answer means nothing, how they answer is what the faces are tested with."
import re
import time

import numpy as np
import pandas as pd
import torch

from skinlesion.data.metadata import MetadataEncoder
from skinlesion.images import save_png
from skinlesion.model.bundle import Member, save_bundle
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set


def build_bundle(folder, label_set=None, size=64):
    "Write a bundle of an image-only and a fused member."
    torch.set_num_threads(1)
    label_set = label_set or get_label_set("ham10000")
    encoder = MetadataEncoder.fit(pd.DataFrame({"age": [30.0, 60.0, 45.0], "sex": ["female", "male", ""], "site": ["back", "scalp", ""]}))
    models = {"image": create_model("resnet10t", label_set.num_classes, seed=1),
              "fused": create_model("resnet10t", label_set.num_classes, encoder.dim, "concat", seed=2)}
    members = [Member(name, model.eval(), model.config) for name, model in models.items()]
    return save_bundle(folder, members, label_set, encoder, size, {"note": "untrained"})


def wait_for_address(process, log, pattern, seconds=120):
    "The address that a server prints into the file `log` once it listens; an AssertionError where it ends or says nothing in time."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = re.search(pattern, log.read_text(errors="replace"))
        if found: return found[1]
        if process.poll() is not None: break
        time.sleep(.1)
    why = f"no address after {seconds} s" if process.poll() is None else f"it ended with {process.returncode}"
    raise AssertionError(f"no server: {why}\n{log.read_text(errors='replace')[-3000:]}")


def build_pictures(folder, names=("a", "b", "c")):
    "Write PNGs of noise over a spot; name -> path."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:60, :90]
    spot = ((y - 30) ** 2 + (x - 45) ** 2 < 300)[..., None]
    return {name: save_png(np.clip(np.where(spot, 90, 200) + rng.integers(-40, 40, (60, 90, 3)), 0, 255).astype(np.uint8), folder / f"{name}.png")
            for name in names}
