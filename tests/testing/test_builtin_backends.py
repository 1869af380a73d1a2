"""The conformance kit on the two engines that lmopt brings."""

from lmopt.testing import parametrize_backend_checks
from lmopt.testing.plan import PlannedCheck


@parametrize_backend_checks("torch")
def test_torch(check: PlannedCheck) -> None:
    check()


@parametrize_backend_checks("onnxruntime")
def test_onnxruntime(check: PlannedCheck) -> None:
    check()
