"""Every test runs without network, and without the user's cache, token or endpoint."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path


_HOME = tempfile.mkdtemp(prefix="hf_sai_tests_")
# Tests run side by side: one thread each, in the processes that they start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any Hugging Face library is imported: they read these once.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: f"{_HOME}/{name.lower()}" for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")},
        "XDG_CACHE_HOME": f"{_HOME}/cache",
    }
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402


pytest.register_assert_rewrite("support")  # before its first import, so that its asserts say what they compared


# Files whose every test is slow: they start processes that import all anew (4 to 10 s of a processor each), or train
# dozens of times. Single tests elsewhere carry the mark themselves.
SLOW = {
    "test_benchmarks",
    "test_diffusers_scripts",
    "test_diffusion",
    "test_distributed",
    "test_distributed_swan",
    "test_docs",
    "test_equivalence",
    "test_examples",
    "test_features",
    "test_hub_trainer",
    "test_kill",
    "test_ranks",
    "test_run",
    "test_text_to_image_example",
    "test_trl_scripts",
    "test_zero",
    "test_zero_trainer",
}


def pytest_collection_modifyitems(items):
    """For `make test-fast`, which runs what is not slow."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser):
    """Tests marked `on_device` run where `--device cuda` says; without it nothing sees a GPU."""
    parser.addoption("--device", default="cpu", help="where tests marked on_device run: cpu, cuda, cuda:1")
    parser.addoption("--write-cards", action="store_true", help="write the fixtures of whole cards anew")


def pytest_configure(config):
    """Before anything asks for CUDA, and for the processes that tests start too."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def device(request):
    """What `--device` names, in tests that are marked `on_device`."""
    assert request.node.get_closest_marker("on_device"), "mark the test on_device"
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers in every test, alone or together."""
    torch.manual_seed(0)


@pytest.fixture
def write_cards(request):
    """Whether fixtures of whole cards are to be written."""
    return request.config.getoption("--write-cards")


@pytest.fixture(autouse=True)
def path_of_children():
    """The launcher, which tests run in this process, leaves a path for what its script starts: for this test only."""
    before = os.environ.get("PYTHONPATH")
    yield
    os.environ.pop("PYTHONPATH", None)
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def no_picture(monkeypatch):
    """For tests that train a lot: a picture takes as long as a training here, and has tests of its own."""
    from support.pictures import no_pictures

    no_pictures(monkeypatch)


@pytest.fixture(scope="session")
def processes():
    """Forks of one process that has imported all: a new one would need seconds for it. The list is read once."""
    context = multiprocessing.get_context("forkserver")
    trainers = [f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "reward", "grpo")]
    ours = ["support.models", "support.trainers", "hf_sai.trainer", "hf_sai.cli.run", "hf_sai.report.plots"]
    context.set_forkserver_preload([*ours, *trainers])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path])))
        yield context


def pytest_collection_finish():
    """What is imported by now need not be looked through by the collection at the end of every training."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Takes the caches of the run away."""
    shutil.rmtree(_HOME, ignore_errors=True)
