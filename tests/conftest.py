"What the tests share: the root of the repository, and a made-up one in which nothing is wrong."
import pytest

from madeup import ROOT, build


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="session")
def good_tree(tmp_path_factory):
    "A small made-up repository in which every check passes; copy it before you change it."
    return build(tmp_path_factory.mktemp("made") / "tree")
