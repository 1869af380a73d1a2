"""Spec of the fake backend."""

from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name="fake",
    engine="lmopt_fake.engine:open_engine",
    can=Capabilities(formats=("fake",), features=frozenset({"taps"})),
    requires=(Requirement(module="lmopt_fake_needs", install="lmopt-fake[needs]"),),
)
