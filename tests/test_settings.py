"The settings that come with the repository are ones the pipeline takes."
import pytest

from madeup import ROOT
from skinlesion.pipeline.params import load_params

SETTINGS = sorted((ROOT / "nbs/settings").glob("*.yaml"))


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_settings_load(path):
    "No unknown key, no missing one, no value out of range."
    assert load_params(path).train.members


def test_there_are_settings():
    "A moved folder is not taken for sound settings."
    assert SETTINGS
