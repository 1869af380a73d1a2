"""Reliability row 21: a seeded defect is found in the right block and at the right operator."""

import json
from dataclasses import replace

import numpy as np
import pytest
from defects import swap_heads
from small_decoder import Config, Decoder, with_weight

from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.evaluation.bisect import locate, relative_error

CONFIG = Config(layers=12)
IDS = np.random.default_rng(1).integers(0, 96, 24)
ONE_PERCENT = 1.01


def healthy():
    return Decoder(CONFIG)


def weight(name, change):
    return lambda: with_weight(healthy(), name, change)


class InOneBlock(Decoder):
    """Does something wrong in block 5 only."""

    wrong: Decoder
    guilty = 5

    def block(self, i, *args):
        self.now = i
        return super().block(i, *args)

    def is_guilty(self):
        return self.now == self.guilty


class Rope(InOneBlock):
    def rotate(self, x, positions):
        return Decoder.rotate(
            replace(healthy(), config=replace(CONFIG, rope_base=5e5)) if self.is_guilty() else self,
            x,
            positions,
        )


class Mask(InOneBlock):
    def attend(self, i, q, k, v, allowed):
        if self.is_guilty():
            allowed = allowed | np.roll(allowed, -1, axis=1)
        return super().attend(i, q, k, v, allowed)


class Scale(InOneBlock):
    def scale(self):
        return super().scale() * np.float32(1.05 if self.is_guilty() else 1)


class Activation(InOneBlock):
    def activation(self, i, gate):
        return gate / (1 + np.exp(-1.702 * gate)) if self.is_guilty() else super().activation(i, gate)


class Eps(InOneBlock):
    guilty = 0

    def block(self, i, *args):
        self.count = 0
        return super().block(i, *args)

    def norm(self, x, weight):
        self.count += 1
        if self.now == 0 and self.count == 1:
            return Decoder.norm(replace(healthy(), config=replace(CONFIG, eps=1e-6)), x, weight)
        return super().norm(x, weight)


class NoResidual(InOneBlock):
    def block(self, i, x, *args):
        x, k, v = super().block(i, x, *args)
        return (
            (self.show(f"model.layers.{i}", x + np.float32(0.01) * np.sign(x)) if self.is_guilty() else x),
            k,
            v,
        )


def bfloat16(w):
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def of(kind):
    return lambda: kind(CONFIG)


L = "model.layers"
# name: (defective engine, block, operator that must be among the suspects)
DEFECTS = {
    "embedding": (
        weight("model.embed_tokens", lambda w: w * ONE_PERCENT),
        "model.embed_tokens",
        "model.embed_tokens",
    ),
    "first block's norm": (
        weight(f"{L}.0.input_layernorm", lambda w: w * ONE_PERCENT),
        f"{L}.0",
        f"{L}.0.input_layernorm",
    ),
    "q of the last block": (
        weight(f"{L}.11.self_attn.q_proj", lambda w: w * ONE_PERCENT),
        f"{L}.11",
        f"{L}.11.self_attn.q_proj",
    ),
    "k": (weight(f"{L}.4.self_attn.k_proj", lambda w: w * ONE_PERCENT), f"{L}.4", f"{L}.4.self_attn.k_proj"),
    "v": (weight(f"{L}.7.self_attn.v_proj", lambda w: w * ONE_PERCENT), f"{L}.7", f"{L}.7.self_attn.v_proj"),
    "o": (weight(f"{L}.2.self_attn.o_proj", lambda w: w * ONE_PERCENT), f"{L}.2", f"{L}.2.self_attn.o_proj"),
    "gate": (weight(f"{L}.3.mlp.gate_proj", lambda w: w * ONE_PERCENT), f"{L}.3", f"{L}.3.mlp.gate_proj"),
    "up": (weight(f"{L}.8.mlp.up_proj", lambda w: w * ONE_PERCENT), f"{L}.8", f"{L}.8.mlp.up_proj"),
    "down": (weight(f"{L}.9.mlp.down_proj", lambda w: w * ONE_PERCENT), f"{L}.9", f"{L}.9.mlp.down_proj"),
    "second norm": (
        weight(f"{L}.6.post_attention_layernorm", lambda w: w * ONE_PERCENT),
        f"{L}.6",
        f"{L}.6.post_attention_layernorm",
    ),
    "last norm": (weight("model.norm", lambda w: w * ONE_PERCENT), "model.norm", "model.norm"),
    "head": (weight("lm_head", lambda w: w * ONE_PERCENT), "lm_head", "lm_head"),
    "swapped heads": (weight(f"{L}.5.self_attn.q_proj", swap_heads), f"{L}.5", f"{L}.5.self_attn.q_proj"),
    "transposed": (weight(f"{L}.10.self_attn.o_proj", np.transpose), f"{L}.10", f"{L}.10.self_attn.o_proj"),
    "bfloat16 weight": (weight(f"{L}.1.mlp.up_proj", bfloat16), f"{L}.1", f"{L}.1.mlp.up_proj"),
    "one element": (
        weight(f"{L}.6.mlp.gate_proj", lambda w: w * (1 + 0.01 * (np.arange(w.size) == 77).reshape(w.shape))),
        f"{L}.6",
        f"{L}.6.mlp.gate_proj",
    ),
    "rope base": (of(Rope), f"{L}.5", f"{L}.5.self_attn"),
    "mask": (of(Mask), f"{L}.5", f"{L}.5.self_attn"),
    "scale": (of(Scale), f"{L}.5", f"{L}.5.self_attn"),
    "activation": (of(Activation), f"{L}.5", f"{L}.5.mlp"),
    "eps": (of(Eps), f"{L}.0", f"{L}.0.input_layernorm"),
    "residual": (of(NoResidual), f"{L}.5", f"{L}.5"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_block_and_the_operator_are_found(name):
    make, block, operator = DEFECTS[name]
    found = locate(healthy(), make(), IDS)
    assert found.block == block
    assert operator in found.suspects
    assert len(found.suspects) <= 2
    assert found.error > 8 * found.error_before


def test_healthy_engines_do_not_part():
    wide = {name: value.astype(np.float64) for name, value in healthy().weights.items()}
    found = locate(Decoder(CONFIG, wide), healthy(), IDS)
    assert found.block is None
    assert 0 < found.error < 1e-4
    assert "cache" in str(found)


def test_the_first_of_two_defects_is_named():
    both = with_weight(DEFECTS["o"][0](), f"{L}.9.mlp.down_proj", lambda w: w * 3)
    assert locate(healthy(), both, IDS).block == f"{L}.2"


def test_a_defect_in_every_block_is_found_in_the_first():
    class EveryRope(Decoder):
        def rotate(self, x, positions):
            return Decoder.rotate(replace(healthy(), config=replace(CONFIG, rope_base=5e5)), x, positions)

    found = locate(healthy(), EveryRope(CONFIG), IDS)
    assert (found.block, found.operator) == (f"{L}.0", f"{L}.0.self_attn.o_proj")
    assert found.last_agreeing == f"{L}.0.self_attn.v_proj"


def test_few_runs_are_needed():
    class Counted(Decoder):
        runs = 0

        def taps(self, input_ids, names):
            self.runs += bool(names)
            return super().taps(input_ids, names)

    ours = Counted(CONFIG)
    locate(ours, DEFECTS["k"][0](), IDS)
    assert ours.runs == 3


def test_only_common_names_are_used():
    class Fewer(Decoder):
        def tap_names(self):
            return [name for name in super().tap_names() if "up_proj" not in name] + ["extra"]

    engine = with_weight(Fewer(CONFIG), f"{L}.8.mlp.up_proj", lambda w: w * ONE_PERCENT)
    found = locate(healthy(), engine, IDS)
    assert found.block == f"{L}.8"
    assert found.operator == f"{L}.8.mlp.down_proj"
    assert f"{L}.8.mlp" in found.suspects
    assert {"extra", f"{L}.0.mlp.up_proj"} <= set(found.missing)


def test_a_value_that_holds_all_others_is_opened():
    class Nested(Decoder):
        def forward(self, *args, **options):
            result = super().forward(*args, **options)
            if self.shown is not None:
                head = self.shown.pop("lm_head")
                self.show("model", self.shown["model.norm"])
                self.show("lm_head", head)
            return result

    engine = with_weight(Nested(CONFIG), f"{L}.8.mlp.up_proj", lambda w: w * ONE_PERCENT)
    found = locate(Nested(CONFIG), engine, IDS)
    assert (found.block, found.operator) == (f"{L}.8", f"{L}.8.mlp.up_proj")


def test_not_a_number_is_found():
    found = locate(healthy(), weight(f"{L}.4.mlp.down_proj", lambda w: w * np.nan)(), IDS)
    assert found.operator == f"{L}.4.mlp.down_proj"


def test_the_finding_is_plain():
    found = locate(healthy(), DEFECTS["k"][0](), IDS)
    assert json.loads(json.dumps(found.to_dict()))["operator"] == f"{L}.4.self_attn.k_proj"
    assert f"{L}.4.self_attn.k_proj" in str(found)


def test_engines_without_taps_and_unknown_types_are_told():
    class Plain:
        pass

    with pytest.raises(UnsupportedError, match=r"candidate.*taps"):
        locate(healthy(), Plain(), IDS)
    with pytest.raises(UnsupportedError, match="reference"):
        locate(Plain(), healthy(), IDS)
    with pytest.raises(UnsupportedOptionError, match="int4"):
        locate(healthy(), healthy(), IDS, dtype="int4")
    assert locate(healthy(), healthy(), IDS, dtype="int4", tolerance=0.1).block is None

    class Stranger(Decoder):
        def tap_names(self):
            return ["other"]

    with pytest.raises(UnsupportedError, match="common name"):
        locate(healthy(), Stranger(CONFIG), IDS)


class Prescribed:
    """Shows values that differ by prescribed relative errors."""

    def __init__(self, errors):
        self.errors = errors

    def tap_names(self):
        return [f"layers.{i}" for i in range(len(self.errors))]

    def taps(self, input_ids, names):
        return {name: np.full((1, 4), 1 + 2 * self.errors[int(name.split(".")[1])]) for name in names}


def test_errors_that_grow_are_no_jump():
    right = Prescribed([0.0] * 6)
    grown = locate(right, Prescribed([1e-6, 6e-6, 4e-5, 2e-4, 1e-3, 6e-3]), IDS)
    assert grown.block is None
    assert grown.error == pytest.approx(6e-3)
    jumped = locate(right, Prescribed([1e-6, 6e-6, 6e-5, 2e-4, 1e-3, 6e-3]), IDS)
    assert jumped.block == "layers.2"
    assert locate(right, Prescribed([0, 1.5e-5, 0, 0, 0, 0]), IDS).block is None
    assert locate(right, Prescribed([0, 1.7e-5, 0, 0, 0, 0]), IDS).block == "layers.1"


def test_relative_error():
    a = np.array([[3.0, 4.0, 0.0]])
    rms = np.sqrt(25 / 3)
    assert relative_error(a, a) == 0
    assert relative_error(a, a + np.array([0, 0, 0.5])) == pytest.approx(0.5 / rms)
    assert relative_error(a, a[:, :2]) == np.inf
    assert relative_error(a, a * np.nan) == np.inf
    assert relative_error(np.zeros((1, 2)), np.zeros((2,))) == 0
    assert relative_error(np.zeros((1, 2)), np.ones((1, 2))) == np.inf
