"""The conformance kit: on a fake GPU here, and on a real one where there is one."""

import unittest

import pytest

from lmopt.testing import ENGINE_CHECKS, SPEC_CHECKS
from lmopt.testing.case import close_shared
from lmopt.testing.checks import check_name
from lmopt.testing.workshop import Workshop

CASES = [("llama", "float32"), ("lstm", "float32"), ("llama", "float16")]
REAL = [*CASES, ("llama", "bfloat16"), *(("gpt", dtype) for dtype in ("float32", "float16", "bfloat16"))]


def run(check, *arguments) -> None:
    try:
        check(*arguments)
    except unittest.SkipTest as reason:
        pytest.skip(str(reason))


def run_case(check, workshop: Workshop, model: str, dtype: str) -> None:
    """Run a check, and close its engine while the GPU that it opened on is still there."""
    case = workshop.case("tensorrt", model, "onnx", "cuda", dtype)()
    try:
        run(check, case)
    finally:
        close_shared(case.shared)


@pytest.mark.parametrize("check", SPEC_CHECKS, ids=check_name)
def test_the_spec(gpu, check) -> None:
    run(check, "tensorrt")


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=check_name)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_on_a_fake_gpu(gpu, workshop: Workshop, check, case) -> None:
    run_case(check, workshop, *case)
    assert not gpu.runtime.capturing
    assert not any(gpu.runtime.streams.values()), "work was left on a stream"


@pytest.mark.gpu
@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=check_name)
@pytest.mark.parametrize("case", REAL, ids="-".join)
def test_on_a_gpu(workshop: Workshop, check, case) -> None:
    run_case(check, workshop, *case)
