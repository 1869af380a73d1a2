"""Train a small Llama in full precision, for figures on weights that never lay on a grid.

    python benchmarks/own_model.py --text FILE --out FOLDER [--steps 700] [--vocab 4096]

The last tenth of the text is held out, for the perplexity that is printed. FOLDER is a Hugging Face folder that
`benchmarks/compression.py` takes as its MODEL.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import lmopt
from lmopt.platform import machine
from lmopt.training import TrainingConfig, train


def write_tokenizer(text: str, vocab: int, folder: Path) -> None:
    """Train byte-level BPE on a text; write it as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>").save_pretrained(folder)


def main() -> None:
    """Train, save and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--vocab", type=int, default=4096)
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists; give another folder, or remove it")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    text = asked.text.read_text(encoding="utf-8")
    cut = text.index("\n", len(text) * 9 // 10)
    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=asked.vocab,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(text[:cut], asked.vocab, folder / "model")
        module.save_pretrained(folder / "model")
        model = lmopt.Model.from_pretrained(folder / "model", dtype="float32")
        how = TrainingConfig(
            learning_rate=2e-3,
            weight_decay=0.1,
            warmup_steps=50,
            lr_scheduler_type="cosine",
            max_steps=asked.steps,
            block_size=256,
            per_device_train_batch_size=16,
        )
        result = train(
            model, text[:cut], evaluation=text[cut:], output=folder / "run", config=how, progress=True
        )
        shutil.copytree(folder / "run" / "model", asked.out)
    print(
        json.dumps(
            {"perplexity": result.perplexity, "parameters": model.facts.parameters, "machine": machine()}
        )
    )


if __name__ == "__main__":
    main()
