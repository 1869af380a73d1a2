"""The conformance kit on the two engines that lmopt brings."""

from lmopt.testing import parametrize_backend_checks
from lmopt.testing.plan import PlannedCheck

NO_MODULES = "a torch.export program is one graph: it has no modules whose outputs could be shown"


@parametrize_backend_checks("torch", expected_failures={"taps_show_values[*-torch.export-*]": NO_MODULES})
def test_torch(check: PlannedCheck) -> None:
    check()


@parametrize_backend_checks("onnxruntime")
def test_onnxruntime(check: PlannedCheck) -> None:
    check()
