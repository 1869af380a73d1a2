"""The conformance kit on the two engines that lmopt brings."""

import pytest

from lmopt.testing import parametrize_backend_checks
from lmopt.testing.plan import PlannedCheck

NO_MODULES = "a torch.export program is one graph: it has no modules whose outputs could be shown"


@pytest.mark.slow
@parametrize_backend_checks(
    "torch", devices=("cpu",), expected_failures={"taps_show_values[*-torch.export-*]": NO_MODULES}
)
def test_torch(check: PlannedCheck, full_sweep: bool) -> None:
    skip_half_types_of_graphs(check, full_sweep)
    check()


@pytest.mark.slow
@parametrize_backend_checks("onnxruntime", devices=("cpu",))
def test_onnxruntime(check: PlannedCheck, full_sweep: bool) -> None:
    skip_half_types_of_graphs(check, full_sweep)
    check()


def skip_half_types_of_graphs(check: PlannedCheck, full_sweep: bool) -> None:
    """Leave the half types of graphs to the Llama in a normal run: writing one takes longer than all its checks."""
    model, _, rest = check.case.partition("-")
    half = rest.endswith("float16") and not rest.startswith("module")
    if half and model != "llama" and not full_sweep:
        pytest.skip("runs with --full-sweep")
