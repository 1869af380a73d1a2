"""Put the fake backend where an installed one would be."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lmopt.artifact import Artifact, publish
from lmopt.testing import Case, Subject
from lmopt.types import ModelFacts

SITE = Path(__file__).parent / "fake_site"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module `lmopt_fake.engine`, its distribution installed for one test."""
    info = tmp_path / "site" / "lmopt_fake-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmopt-fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmopt.backends]\nfake = lmopt_fake.spec:BACKEND\n")
    monkeypatch.syspath_prepend(str(SITE))
    monkeypatch.syspath_prepend(str(info.parent))
    return importlib.import_module("lmopt_fake.engine")


@pytest.fixture
def case(fake: ModuleType, tmp_path: Path) -> Case:
    """The fake backend's one case, its artefact real, so that tampering is found."""
    import numpy as np

    weights = fake.make_weights()
    with publish(tmp_path / "model") as staging:
        np.save(staging.path / "weights.npy", weights)
        (staging.path / "notes.txt").write_text("not read by the engine " * 10)
        staging.manifest["formats"]["fake"] = {}
    subject = Subject(
        name="sum",
        format="fake",
        facts=ModelFacts(vocab_size=fake.VOCAB),
        reference=lambda row: fake.reference(weights, row),
        artifact=Artifact.open(tmp_path / "model"),
    )
    return Case("fake", subject)
