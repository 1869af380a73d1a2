"""Seeded tiny encoder-decoders, built in code, beside the decoders of `lmopt.testing.models`."""

from typing import TYPE_CHECKING, Any, Final

from lmopt.testing.models import require_torch, seeded
from lmopt.types import SourceFacts

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCAB_SIZE: Final = 99
T5_SOURCE: Final = SourceFacts("ids", start_token_id=0, size=VOCAB_SIZE)
WHISPER_SOURCE: Final = SourceFacts("features", start_token_id=3, size=8, length=40, fixed=True)
SEQ2SEQ_SOURCE: Final = SourceFacts("ids", start_token_id=1, size=60)
"""What the encoder of `tiny_seq2seq` reads."""


def tiny_t5(seed: int = 0) -> "nn.Module":
    """Make a T5: positions by distance, bias of the first layer shared by all."""
    require_torch()
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config), seed)


def tiny_bart(seed: int = 0) -> "nn.Module":
    """Make a BART: learned positions, one embedding for encoder, decoder and head."""
    require_torch()
    import transformers

    config = transformers.BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=2,
    )
    return seeded(lambda: transformers.BartForConditionalGeneration(config), seed)


def tiny_whisper(seed: int = 0) -> "nn.Module":
    """Make a Whisper that hears 40 frames of 8 mel bins."""
    require_torch()
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=64,
        num_mel_bins=8,
        pad_token_id=2,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
    )
    return seeded(lambda: transformers.WhisperForConditionalGeneration(config), seed)


def tiny_seq2seq(seed: int = 0) -> "nn.Module":
    """Make an own LSTM encoder-decoder with attention over the encoder's outputs (Luong et al., arXiv:1508.04025).

    Its state is the decoder's `(h, c)`, which begins as the encoder's last one, and the encoder's outputs, which
    stay as they are. It takes no mask: sources of unequal length are kept apart.
    """
    require_torch()
    import torch
    from torch import nn

    class TinySeq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = nn.Embedding(SEQ2SEQ_SOURCE.size, 24)
            self.target = nn.Embedding(80, 24)
            self.encoder = nn.LSTM(24, 24, batch_first=True)
            self.decoder = nn.LSTM(24, 24, batch_first=True)
            self.query = nn.Linear(24, 24, bias=False)
            self.head = nn.Linear(48, 80)

        def encode(self, inputs: "Tensor") -> Any:
            memory, state = self.encoder(self.source(inputs))
            return state, memory

        def forward(self, input_ids: "Tensor", state: Any) -> Any:
            own, memory = state
            hidden, own = self.decoder(self.target(input_ids), own)
            scores = self.query(hidden) @ memory.transpose(1, 2)
            attended = scores.softmax(-1) @ memory
            return self.head(torch.cat([hidden, attended], dim=-1)), (own, memory)

    return seeded(TinySeq2Seq, seed)
