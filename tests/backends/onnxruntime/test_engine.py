import pytest

from lmopt.backends.onnxruntime.growing_cache import GrowingCacheEngine
from lmopt.backends.onnxruntime.shared_cache import SharedCacheEngine
from lmopt.errors import UnsupportedOptionError


def test_the_dialect_of_the_graph_chooses_the_engine(opened):
    assert isinstance(opened("portable"), GrowingCacheEngine)
    shared = opened("onnxruntime", spinning=False, deterministic=True)
    assert isinstance(shared, SharedCacheEngine)
    details = shared.report().details
    assert details["target"] == "onnxruntime"
    assert details["state"] == "shared cache"
    assert details["deterministic"] is True


@pytest.mark.parametrize("options", [{"spinning": "yes"}, {"deterministic": 1}, {"spin": True}])
def test_options_are_named_and_true_or_false(opened, options):
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
        opened(**options)


def test_deterministic_is_refused_where_it_would_be_an_empty_word(opened):
    with pytest.raises(UnsupportedOptionError, match=r"portable.*target='onnxruntime'"):
        opened("portable", deterministic=True)


@pytest.mark.parametrize("dialect", ["portable", "onnxruntime"])
def test_spinning_is_what_the_session_is_told(opened, dialect):
    for spinning in (True, False):
        session = opened(dialect, spinning=spinning)._graph.session()
        told = session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning")
        assert told == str(int(spinning))
