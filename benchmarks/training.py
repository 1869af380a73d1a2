"""Is training through lmopt as good and as fast as the plain torch loop that one would write by hand?

    python benchmarks/training.py --text FILE [--text FILE ...] [--steps 400] [--seeds 1] [--rounds 7]
        [--json FILE] [--only lstm] [--only gpt] [--speed-only | --quality-only]

Two architectures, an LSTM and a small GPT, both own modules. Quality: both ways train equal copies for the same
number of steps on the same rows with the same optimiser and schedule (and the plain loop once more with an order
of its own, to see what the order alone does), and the held-out
last tenth is measured by `lmopt.evaluation.perplexity`. Speed: both take turns in this process, some steps a turn;
medians of the turns.
"""

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from lmopt import Model, Runtime
from lmopt.platform import machine
from lmopt.training import Corpus, TrainingConfig, train
from lmopt.training.sources import ShuffledBlocks

VOCABULARY: Final = 2048
BLOCK: Final = 64
ROWS: Final = 16
CONFIG: Final = TrainingConfig(
    learning_rate=3e-3,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    per_device_train_batch_size=ROWS,
    block_size=BLOCK,
    save_steps=None,
    device="cpu",
)


class Lstm(nn.Module):
    """The LSTM of every tutorial."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read tokens."""
        hidden, state = self.lstm(self.embedding(input_ids), state)
        return self.head(hidden), state


class Block(nn.Module):
    """Attention and MLP with norms in front."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add what attention and MLP find."""
        rows, length, size = hidden.shape
        query, key, value = (
            self.qkv(self.norm_1(hidden)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(rows, length, size))
        update: Tensor = self.down(functional.gelu(self.up(self.norm_2(hidden))))
        return hidden + update


class Gpt(nn.Module):
    """A small GPT without a cache."""

    def __init__(self, hidden: int = 128, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Embedding(512, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.05)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Read whole rows."""
        hidden = self.tokens(input_ids) + self.positions(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def own_order(ids: Tensor, steps: int, seed: int) -> Tensor:
    """Shuffle blocks as one writes it."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (len(ids) - 1) // BLOCK
    return torch.cat([torch.randperm(blocks, generator=generator) for _ in range(1 + steps * ROWS // blocks)])


def our_order(ids: Tensor, steps: int, seed: int) -> Tensor:
    """Give the order in which lmopt reads blocks with a seed."""
    source = ShuffledBlocks(Corpus(ids.numpy().astype(np.int32), 1), BLOCK, ROWS, seed)
    return torch.from_numpy(np.concatenate([source.rows(step, 0, ROWS).blocks for step in range(steps)]))


def plain_steps(module: nn.Module, ids: Tensor, steps: int, order: Tensor) -> float:
    """Train by a loop as one writes it, on blocks in a given order; return its seconds."""
    decayed = [one for one in module.parameters() if one.dim() > 1]
    rest = [one for one in module.parameters() if one.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": CONFIG.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=CONFIG.learning_rate,
    )
    warmup = CONFIG.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    module.train()
    began = time.perf_counter()
    for step in range(steps):
        starts = order[step * ROWS : (step + 1) * ROWS] * BLOCK
        windows = ids[starts[:, None] + torch.arange(BLOCK + 1)]
        found = module(windows[:, :-1])
        logits = found[0] if isinstance(found, tuple) else found
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}")
    seconds = time.perf_counter() - began
    module.eval()
    return seconds


def held_out_perplexity(module: nn.Module, ids: list[int]) -> float:
    """Measure on windows of the block size."""
    with Runtime(Model.from_module(module), backend="torch") as runtime:
        return runtime.perplexity(ids, context=BLOCK, stride=BLOCK).value


def compare_quality(
    start: nn.Module, ids: Tensor, held_out: list[int], steps: int, seeds: int
) -> dict[str, Any]:
    """Train copies each way: on the same rows, and by a loop with an order of its own, which tells the noise.

    `ids` must be whole blocks and one more, so that both read the same.
    """
    found: dict[str, list[float]] = {"plain, same rows": [], "plain, other order": [], "lmopt": []}
    tokens = 0
    for seed in range(seeds):
        for name, order in (("plain, same rows", our_order), ("plain, other order", own_order)):
            plain = copy.deepcopy(start)
            plain_steps(plain, ids, steps, order(ids, steps, seed))
            found[name].append(held_out_perplexity(plain, held_out))
        ours = copy.deepcopy(start)
        config = TrainingConfig(**{**CONFIG.to_dict(), "max_steps": steps, "seed": seed})
        result = train(Model.from_module(ours), ids.numpy(), evaluation=held_out, config=config)
        assert result.perplexity is not None
        found["lmopt"].append(result.perplexity)
        tokens = result.tokens
    ratios = [one / other for one, other in zip(found["lmopt"], found["plain, same rows"], strict=True)]
    return {
        "before": held_out_perplexity(start, held_out),
        "by_seed": found,
        "ratio": statistics.geometric_mean(ratios),
        "tokens": tokens,
    }


def compare_speed(start: nn.Module, ids: Tensor, steps: int, rounds: int) -> dict[str, Any]:
    """Let both take turns on copies of their own."""
    plain, ours = copy.deepcopy(start), copy.deepcopy(start)
    model = Model.from_module(ours)
    config = TrainingConfig(**{**CONFIG.to_dict(), "max_steps": steps})
    tokens = steps * ROWS * BLOCK
    rates: dict[str, list[float]] = {"plain": [], "lmopt": [], "whole calls": []}
    for turn in range(rounds + 1):
        seconds = plain_steps(plain, ids, steps, own_order(ids, steps, turn))
        began = time.perf_counter()
        result = train(model, ids.numpy(), config=config)
        whole = time.perf_counter() - began
        if turn:  # the first warms up
            rates["plain"].append(tokens / seconds)
            rates["lmopt"].append(result.tokens_per_s)
            rates["whole calls"].append(tokens / whole)
    medians = {name: statistics.median(some) for name, some in rates.items()}
    ratios = [mine / other for mine, other in zip(rates["lmopt"], rates["plain"], strict=True)]
    return {
        "tokens_per_s": medians,
        "least": {name: min(some) for name, some in rates.items()},
        "most": {name: max(some) for name, some in rates.items()},
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--turn-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", action="append", choices=("lstm", "gpt"))
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--quality-only", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning, held_out_text = zip(
        *((one[: len(one) * 9 // 10], one[len(one) * 9 // 10 :]) for one in texts), strict=True
    )
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(learning, trainer)
    ids = torch.from_numpy(np.concatenate([tokenizer.encode(one).ids for one in learning]))
    ids = ids[: (len(ids) - 1) // BLOCK * BLOCK + 1]
    held_out = [one for text in held_out_text for one in tokenizer.encode(text).ids]
    print(f"{len(ids):,} tokens to learn, {len(held_out):,} held out; threads: {torch.get_num_threads()}")
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "steps": args.steps}
    for name, kind in (("lstm", Lstm), ("gpt", Gpt)):
        if args.only and name not in args.only:
            continue
        torch.manual_seed(0)
        start = kind().eval()
        found[name] = {"parameters": sum(one.numel() for one in start.parameters())}
        if not args.speed_only:
            found[name]["quality"] = compare_quality(start, ids, held_out, args.steps, args.seeds)
        if not args.quality_only:
            found[name]["speed"] = compare_speed(start, ids, args.turn_steps, args.rounds)
        print(name, json.dumps(found[name], indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
