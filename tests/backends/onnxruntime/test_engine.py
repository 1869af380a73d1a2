import numpy as np
import pytest

from lmopt.backends.onnxruntime.growing_cache import GrowingCacheEngine
from lmopt.backends.onnxruntime.shared_cache import SharedCacheEngine
from lmopt.errors import UnsupportedOptionError
from lmopt.testing.workshop import Workshop


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


def test_the_two_graphs_of_an_encoder_decoder_do_not_spin_unless_told_to(opened):
    def told(graph):
        options = graph.session().get_session_options()
        return options.get_session_config_entry("session.intra_op.allow_spinning")

    assert told(opened("portable")._graph) == "1"
    with Workshop() as workshop:
        for options, expected in (({}, "0"), ({"spinning": True}, "1")):
            case = workshop.case("onnxruntime", "t5", "onnx", "cpu", "float32")()
            engine = case.open(options=options)
            assert told(engine.inner._graph) == expected
            engine.close()


def test_a_state_that_is_rewound_owns_its_memory():
    """What a value of ONNX Runtime shows as an array does not keep alive the array that the value was made from."""
    with Workshop() as workshop:
        engine = workshop.case("onnxruntime", "t5", "onnx", "cpu", "float32")().open()
        ids, one = np.array([[5, 6, 7], [8, 9, 10]]), np.array([1, 1])
        state = engine.begin(2)
        signature = engine.inner._signature
        source = {part.past.name: state.tensors[part.past.name] for part in signature.from_source}
        assert source
        for _ in range(3):
            _, state = engine.forward(ids, np.array([3, 3]), state)
            before = {part.past.name: state.tensors[part.past.name] for part in signature.changing}
            state = engine.rewind(state, one)
            for name, value in source.items():
                assert state.tensors[name] is value
            for name, value in before.items():
                assert not np.shares_memory(state.tensors[name].numpy(), value.numpy())
        engine.close()
