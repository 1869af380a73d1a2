"""A small decoder in plain NumPy: an engine with a cache and real padding, and its honest oracle.

The engine is cut into small methods so that a seeded defect is one override. The oracle shares no
code with it: full attention, float64, one row, no cache, no padding.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from lmopt.contracts import EngineReport
from lmopt.types import ModelFacts


@dataclass(frozen=True)
class Config:
    vocab: int = 96
    hidden: int = 32
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    inner: int = 48
    rope_base: float = 10000.0
    eps: float = 1e-5
    context: int | None = 256

    @property
    def head_dim(self):
        return self.hidden // self.heads


def random_weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    h, d = config.hidden, config.head_dim

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    # A small embedding, as trained models have: the first norm's eps then matters.
    weights = {"model.embed_tokens": 0.05 * matrix(config.vocab, h)}
    for i in range(config.layers):
        block = f"model.layers.{i}"
        weights[f"{block}.input_layernorm"] = (1 + 0.2 * random.standard_normal(h)).astype(np.float32)
        weights[f"{block}.self_attn.q_proj"] = matrix(config.heads * d, h)
        weights[f"{block}.self_attn.k_proj"] = matrix(config.kv_heads * d, h)
        weights[f"{block}.self_attn.v_proj"] = matrix(config.kv_heads * d, h)
        weights[f"{block}.self_attn.o_proj"] = matrix(h, config.heads * d)
        weights[f"{block}.post_attention_layernorm"] = (1 + 0.2 * random.standard_normal(h)).astype(
            np.float32
        )
        weights[f"{block}.mlp.gate_proj"] = matrix(config.inner, h)
        weights[f"{block}.mlp.up_proj"] = matrix(config.inner, h)
        weights[f"{block}.mlp.down_proj"] = matrix(h, config.inner)
    weights["model.norm"] = (1 + 0.2 * random.standard_normal(h)).astype(np.float32)
    weights["lm_head"] = 2 * matrix(config.vocab, h)
    return weights


def oracle(config: Config, weights: dict[str, np.ndarray]):
    """Full forward of one row in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    d, group = config.head_dim, config.heads // config.kv_heads

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps)

    def rotate(x):  # (sequence, heads, head_dim)
        angles = np.arange(len(x))[:, None] * config.rope_base ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def logits(ids):
        n = len(ids)
        x = w["model.embed_tokens"][ids]
        for i in range(config.layers):
            p = f"model.layers.{i}."
            y = norm(x, w[p + "input_layernorm"])
            q = rotate((y @ w[p + "self_attn.q_proj"].T).reshape(n, config.heads, d))
            k = rotate((y @ w[p + "self_attn.k_proj"].T).reshape(n, config.kv_heads, d))
            v = (y @ w[p + "self_attn.v_proj"].T).reshape(n, config.kv_heads, d)
            out = np.empty_like(q)
            for head in range(config.heads):
                scores = q[:, head] @ k[:, head // group].T / np.sqrt(d)
                scores[np.triu_indices(n, 1)] = -np.inf
                p_ = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, head] = p_ / p_.sum(-1, keepdims=True) @ v[:, head // group]
            x = x + out.reshape(n, -1) @ w[p + "self_attn.o_proj"].T
            y = norm(x, w[p + "post_attention_layernorm"])
            gate = y @ w[p + "mlp.gate_proj"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w[p + "mlp.up_proj"].T)) @ w[p + "mlp.down_proj"].T
        return (norm(x, w["model.norm"]) @ w["lm_head"].T).astype(np.float32)

    return logits


@dataclass
class Cache:
    """Keys and values by layer `(batch, kv_heads, slots, head_dim)`, and which slots hold a token."""

    keys: list[np.ndarray]
    values: list[np.ndarray]
    valid: np.ndarray
    side: str = "right"
    consumed: bool = False

    @property
    def lengths(self):
        return self.valid.sum(1)


@dataclass
class Decoder:
    config: Config = field(default_factory=Config)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    dtype: str = "float32"
    ragged: bool = True

    def __post_init__(self):
        self.weights = self.weights or random_weights(self.config)
        self.shown: dict[str, np.ndarray] | None = None
        self.closed = False

    # The contract ---------------------------------------------------------------------------

    @property
    def facts(self):
        return ModelFacts(self.config.vocab, self.config.context)

    def begin(self, batch, *, capacity=None, padding_side="right"):
        c = self.config
        empty = [np.zeros((batch, c.kv_heads, 0, c.head_dim), np.float32) for _ in range(c.layers)]
        return Cache(empty, list(empty), np.zeros((batch, 0), bool), padding_side)

    def forward(self, input_ids, lengths, state, *, last_only=False):
        assert not state.consumed, "a consumed state was used"
        state.consumed = True
        width = input_ids.shape[1]
        order = self.slots(lengths, width, state.side)  # (batch, width): column of input_ids in each slot
        new_valid = self.validity(order, lengths)
        ids = np.take_along_axis(input_ids, order, 1)
        valid = np.concatenate([state.valid, new_valid], 1)
        positions = self.positions(state, valid, width)
        allowed = self.mask(valid, width)
        keys, values = [], []
        x = self.embed(ids)
        for i in range(self.config.layers):
            x, k, v = self.block(i, x, positions, allowed, state)
            keys.append(k)
            values.append(v)
        x = self.show("model.norm", self.norm(x, self.weights["model.norm"]))
        logits = self.show("lm_head", x @ self.weights["lm_head"].T)
        back = np.argsort(order, axis=1)
        logits = np.take_along_axis(logits, back[:, :, None], 1)
        if last_only:
            logits = self.last(logits, lengths)
        return logits.astype(np.float32), Cache(keys, values, valid, state.side)

    def select(self, state, rows):
        state.consumed = True
        return Cache(
            [k[rows] for k in state.keys], [v[rows] for v in state.values], state.valid[rows], state.side
        )

    def join(self, states):
        slots = max(state.valid.shape[1] for state in states)

        def widen(array, axis):
            pad = [(0, 0)] * array.ndim
            pad[axis] = (0, slots - array.shape[axis])
            return np.pad(array, pad)

        for state in states:
            state.consumed = True
        layers = range(self.config.layers)
        return Cache(
            [np.concatenate([widen(s.keys[i], 2) for s in states]) for i in layers],
            [np.concatenate([widen(s.values[i], 2) for s in states]) for i in layers],
            np.concatenate([widen(s.valid, 1) for s in states]),
            states[0].side,
        )

    def report(self):
        return EngineReport("small", "cpu", self.dtype, 1)

    def close(self):
        self.closed = True

    # Taps -----------------------------------------------------------------------------------

    def tap_names(self):
        self.taps(np.zeros((1, 1), np.int64), [])
        return list(self._order)

    def taps(self, input_ids, names):
        self.shown = {}
        self.forward(input_ids, np.array([input_ids.shape[1]]), self.begin(1))
        shown, self.shown = self.shown, None
        self._order = list(shown)
        return {name: shown[name] for name in names}

    def show(self, name, value):
        if self.shown is not None:
            self.shown[name] = value
        return value

    # Pieces that a defect may override ------------------------------------------------------

    def slots(self, lengths, width, side):
        columns = np.tile(np.arange(width), (len(lengths), 1))
        return columns if side == "right" else (columns + lengths[:, None]) % width

    def validity(self, order, lengths):
        return order < lengths[:, None]

    def positions(self, state, valid, width):
        return (np.cumsum(valid, 1) - 1)[:, -width:]

    def mask(self, valid, width):
        """`(batch, width, slots)`: whether a new token may look at a slot."""
        slots = valid.shape[1]
        causal = np.arange(slots) <= np.arange(slots - width, slots)[:, None]
        return causal & valid[:, None]

    def last(self, logits, lengths):
        return np.take_along_axis(logits, (lengths - 1)[:, None, None], 1)

    def embed(self, ids):
        return self.show("model.embed_tokens", self.weights["model.embed_tokens"][ids])

    def norm(self, x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config.eps))

    def rotate(self, x, positions):  # (batch, heads, width, head_dim)
        d = self.config.head_dim
        angles = positions[:, None, :, None] * self.config.rope_base ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def append(self, old, new):
        return np.concatenate([old, new], 2)

    def linear(self, name, x):
        return self.show(name, x @ self.weights[name].T)

    def scale(self):
        return np.float32(1 / np.sqrt(self.config.head_dim))

    def attend(self, i, q, k, v, allowed):
        group = self.config.heads // self.config.kv_heads
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.where(allowed[:, None], q @ k.swapaxes(-1, -2) * self.scale(), np.float32(-1e30))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True) @ v

    def activation(self, i, gate):
        return gate / (1 + np.exp(-gate))

    def block(self, i, x, positions, allowed, state):
        c, name = self.config, f"model.layers.{i}"
        batch, width = x.shape[:2]

        def heads(y, count):
            return y.reshape(batch, width, count, c.head_dim).swapaxes(1, 2)

        y = self.show(f"{name}.input_layernorm", self.norm(x, self.weights[f"{name}.input_layernorm"]))
        q = self.rotate(heads(self.linear(f"{name}.self_attn.q_proj", y), c.heads), positions)
        k = self.rotate(heads(self.linear(f"{name}.self_attn.k_proj", y), c.kv_heads), positions)
        v = heads(self.linear(f"{name}.self_attn.v_proj", y), c.kv_heads)
        k, v = self.append(state.keys[i], k), self.append(state.values[i], v)
        attended = self.attend(i, q, k, v, allowed).swapaxes(1, 2).reshape(batch, width, -1)
        x = x + self.show(f"{name}.self_attn", self.linear(f"{name}.self_attn.o_proj", attended))
        y = self.norm(x, self.weights[f"{name}.post_attention_layernorm"])
        y = self.show(f"{name}.post_attention_layernorm", y)
        gate = self.activation(i, self.linear(f"{name}.mlp.gate_proj", y))
        down = self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", y))
        x = x + self.show(f"{name}.mlp", down)
        return self.show(name, x), k, v


def with_weight(decoder: Decoder, name: str, change) -> Decoder:
    """A copy of the decoder in which one weight was changed by a function."""
    weights = dict(decoder.weights)
    weights[name] = change(weights[name]).astype(np.float32)
    return replace(decoder, weights=weights)
