"""The training scripts of diffusers, unmodified, where there is a checkout: `DIFFUSERS_EXAMPLES=<it>/examples`."""

from __future__ import annotations

import os

import pytest
from diffusers_scripts import CASES, OPTIMS, prepare, run_case


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny pipelines and drawings, for all the scripts."""
    folder = tmp_path_factory.mktemp("diffusers")
    prepare(folder)
    return folder


@pytest.mark.skipif("DIFFUSERS_EXAMPLES" not in os.environ, reason="needs a checkout: DIFFUSERS_EXAMPLES=.../examples")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("script", CASES)
def test_an_unmodified_script_reaches_its_last_step(root, script, optim):
    result = run_case(script, optim, os.environ["DIFFUSERS_EXAMPLES"], root)
    assert (result.ok, result.steps, result.remark) == (True, 4, "")
