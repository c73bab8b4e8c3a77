"What the tests share: the root of the repository, and a made-up one in which nothing is wrong."
import pytest

pytest.register_assert_rewrite("madeup")  # so that its assertions name what is wrong

from madeup import ROOT, build


SHARING = ("test_pipeline", "test_resume")  # the files that run stages in one trained repository


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "Each file runs in one process; those that share a repository in the same one, and first, as they take longest."
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("stages" if name in SHARING else name))
    items.sort(key=lambda item: item.path.stem not in SHARING)


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="session")
def good_tree(tmp_path_factory):
    "A small made-up repository in which every check passes; copy it before you change it."
    return build(tmp_path_factory.mktemp("made") / "tree")


@pytest.fixture
def one_thread():
    "Small tensors: more threads only wait for one another, and one gives the same sums on every machine."
    import torch  # seconds, for the files that ask for it
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
