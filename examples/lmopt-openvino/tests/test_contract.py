"""lmopt's own conformance kit, driven by what the spec declares."""

from lmopt.testing import parametrize_backend_checks


@parametrize_backend_checks("openvino", dialects=("portable",))
def test_contract(check):
    check()
