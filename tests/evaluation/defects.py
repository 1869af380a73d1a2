"""Seeded defects: what exporters and engines really get wrong, one at a time."""

from dataclasses import replace

import numpy as np
from small_decoder import Cache, Config, Decoder, with_weight

CONFIG = Config()


def healthy(config: Config = CONFIG) -> Decoder:
    return Decoder(config)


def weight(name, change):
    return lambda: with_weight(healthy(), name, change)


def swap_heads(matrix, d=CONFIG.head_dim):
    swapped = matrix.copy()
    swapped[:d], swapped[d : 2 * d] = matrix[d : 2 * d], matrix[:d]
    return swapped


def int4_wrong_zero_point(matrix):
    """Quantise to 4 bits and read the zero point one too high in one group."""
    scale = np.abs(matrix[:, :4]).max(1, keepdims=True) / 7
    wrong = matrix.copy()
    wrong[:, :4] += scale
    return wrong


class WrongRopeBase(Decoder):
    def rotate(self, x, positions):
        return Decoder.rotate(replace(self, config=replace(self.config, rope_base=1e6)), x, positions)


class InterleavedRope(Decoder):
    def rotate(self, x, positions):
        halves = np.concatenate([x[..., 0::2], x[..., 1::2]], -1)
        return super().rotate(halves, positions)


class MaskOffByOne(Decoder):
    def mask(self, valid, width):
        slots = valid.shape[1]
        return (np.arange(slots) <= np.arange(slots - width, slots)[:, None] + 1) & valid[:, None]


class WrongEps(Decoder):
    def norm(self, x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-6))


class StaleCache(Decoder):
    """The last layer's values are not updated after the first call."""

    def append(self, old, new):
        self.turn = getattr(self, "turn", -1) + 1
        if self.turn % (2 * self.config.layers) == 2 * self.config.layers - 1 and old.shape[2]:
            new = np.repeat(old[:, :, -1:], new.shape[2], 2)
        return super().append(old, new)


class PositionsCountPadding(Decoder):
    """Positions are slot numbers: right only where nothing was padded."""

    def positions(self, state, valid, width):
        slots = valid.shape[1]
        return np.tile(np.arange(slots - width, slots), (len(valid), 1))


class WrongPastLength(Decoder):
    """Cached calls start one position late."""

    def positions(self, state, valid, width):
        return super().positions(state, valid, width) + (1 if state.valid.shape[1] else 0)


class IgnoredPadding(Decoder):
    def mask(self, valid, width):
        return super().mask(np.ones_like(valid), width)


class WrongRowInSelect(Decoder):
    def select(self, state, rows):
        return super().select(state, np.sort(rows))


class SelectForgetsValues(Decoder):
    def select(self, state, rows):
        chosen = super().select(state, rows)
        return (
            Cache(chosen.keys, [v[: len(rows)] for v in np.array(state.values)], chosen.valid, state.side)
            if (len(rows) <= len(state.valid))
            else chosen
        )


class JoinReversed(Decoder):
    def join(self, states):
        return super().join(states[::-1])


class LastColumn(Decoder):
    """`last_only` takes the last column instead of each row's last token."""

    def last(self, logits, lengths):
        return logits[:, -1:]


class TruncatedContext(Decoder):
    """Attention sees the last 64 slots only."""

    def mask(self, valid, width):
        slots = valid.shape[1]
        near = np.arange(slots) > np.arange(slots - width, slots)[:, None] - 64
        return super().mask(valid, width) & near


class BakedLength(Decoder):
    """A length seen at export is baked in: queries beyond the 100th token rotate as the 100th."""

    def positions(self, state, valid, width):
        return np.minimum(super().positions(state, valid, width), 100)


class SeveralNotCausal(Decoder):
    """Several tokens at once from the cache see each other without a causal mask."""

    def mask(self, valid, width):
        if width == valid.shape[1]:
            return super().mask(valid, width)
        return np.repeat(valid[:, None], width, 1)


class GroupOrder(Decoder):
    """Grouped-query heads are tiled instead of repeated."""

    def attend(self, i, q, k, v, allowed):
        order = np.arange(self.config.heads) % self.config.kv_heads
        group = self.config.heads // self.config.kv_heads
        single = Decoder(replace(self.config, kv_heads=self.config.heads), self.weights)
        assert group > 1
        return single.attend(i, q, k[:, order], v[:, order], allowed)


class WrongScale(Decoder):
    def scale(self):
        return super().scale() * np.float32(1.02)


class Gelu(Decoder):
    def activation(self, i, gate):
        return gate / (1 + np.exp(-1.702 * gate))


class BatchedKeysInBfloat16(Decoder):
    """Batches other than one lose precision: keys are kept in bfloat16."""

    def append(self, old, new):
        if new.shape[0] > 1:
            new = (new.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return super().append(old, new)


class LeftPaddingShift(Decoder):
    """Logits of left-padded rows are not moved back to where the caller put the tokens."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        logits, after = super().forward(input_ids, lengths, state, last_only=last_only)
        if state.side == "left" and not last_only:
            logits = np.take_along_axis(
                logits, self.slots(lengths, input_ids.shape[1], "left")[:, :, None], 1
            )
        return logits, after


class NotANumber(Decoder):
    """A prompt of several tokens gives NaN in one logit of its last token."""

    def last(self, logits, lengths):
        logits = super().last(logits, lengths)
        logits[:, :, 5] = np.where(lengths[:, None] == 1, logits[:, :, 5], np.nan)
        return logits


class LastOfLeftPadded(Decoder):
    """`last_only` takes the wrong row, with padding on the left only."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        wrong = last_only and state.side == "left"
        logits, after = super().forward(input_ids, lengths, state, last_only=last_only and not wrong)
        return (logits[:, -1:] if wrong else logits), after


class CachedPiecesTakenWhole(Decoder):
    """Where rows read unequal pieces from the cache, their padding is read as tokens."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        taken = np.full_like(lengths, input_ids.shape[1]) if state.valid.shape[1] else lengths
        return super().forward(input_ids, taken, state, last_only=last_only)


class GuessedPadding(Decoder):
    """Padding is guessed from the token id 0, and `lengths` ignored."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        guessed = np.maximum(1, (input_ids != 0).sum(1))
        return super().forward(input_ids, guessed, state, last_only=last_only)


def of(kind):
    return lambda: kind(CONFIG)


DEFECTS = {
    "one weight x 1.01": weight("model.layers.1.mlp.up_proj", lambda w: w * 1.01),
    "one norm x 1.01": weight("model.layers.2.input_layernorm", lambda w: w * 1.01),
    "one output channel x 1.01": weight(
        "model.layers.1.self_attn.o_proj", lambda w: w * np.where(np.arange(len(w)) == 3, 1.01, 1)[:, None]
    ),
    "swapped heads": weight("model.layers.0.self_attn.q_proj", swap_heads),
    "transposed matrix": weight("model.layers.1.self_attn.q_proj", np.transpose),
    "wrong zero point": weight("model.layers.2.mlp.down_proj", int4_wrong_zero_point),
    "bfloat16 weight": weight(
        "model.layers.0.self_attn.v_proj",
        lambda w: (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    ),
    "wrong rope base": of(WrongRopeBase),
    "interleaved rope": of(InterleavedRope),
    "mask off by one": of(MaskOffByOne),
    "wrong eps": of(WrongEps),
    "stale cache": of(StaleCache),
    "positions count padding": of(PositionsCountPadding),
    "wrong past length": of(WrongPastLength),
    "ignored padding": of(IgnoredPadding),
    "wrong row in select": of(WrongRowInSelect),
    "select forgets values": of(SelectForgetsValues),
    "join reversed": of(JoinReversed),
    "last_only takes last column": of(LastColumn),
    "truncated context": of(TruncatedContext),
    "baked length": of(BakedLength),
    "several not causal": of(SeveralNotCausal),
    "wrong head groups": of(GroupOrder),
    "wrong attention scale": of(WrongScale),
    "wrong activation": of(Gelu),
    "batched keys in bfloat16": of(BatchedKeysInBfloat16),
    "left padding not undone": of(LeftPaddingShift),
    "one NaN": of(NotANumber),
    "last_only on the left": of(LastOfLeftPadded),
    "cached pieces taken whole": of(CachedPiecesTakenWhole),
    "guessed padding": of(GuessedPadding),
}
"""Name to a function that builds a decoder with that defect and no other."""
