"""Train a model: from texts to a better model, in one call."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import torch
from accelerate import Accelerator
from torch import nn

from lmopt.artifact import is_artifact
from lmopt.errors import (
    ArtifactExistsError,
    ContextLengthError,
    InputError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.model import Model
from lmopt.training import checkpointing
from lmopt.training.config import TrainingConfig
from lmopt.training.data import Corpus, Data, read_corpus
from lmopt.training.evaluating import HeldOut
from lmopt.training.keeping import Keeper
from lmopt.training.learner import Learner
from lmopt.training.loop import Run
from lmopt.training.objective import Loss, NextToken
from lmopt.training.parallel import accelerated, shard, take_back
from lmopt.training.plot import plot_losses
from lmopt.training.preparing import trainable
from lmopt.training.progress import Progress, showing
from lmopt.training.result import Journal, TrainingResult
from lmopt.training.schedule import make_optimizer
from lmopt.training.sources import ContiguousStreams, ShuffledBlocks, Source

_BLOCK: Final = 512
MakeSource = Callable[[TrainingConfig, int], Source]


def train(
    model: Model,
    data: Data,
    *,
    evaluation: Data = None,
    output: str | os.PathLike[str] | None = None,
    config: TrainingConfig | None = None,
    loss: Loss | None = None,
    make_source: MakeSource | None = None,
    resume: Literal[True, "never"] = True,
    save_model: bool = True,
    progress: Progress = False,
) -> TrainingResult:
    """Train a model, by maximum likelihood of the next token unless another loss is given.

    Under `lmopt launch` or torchrun, every process makes this same call and all train one model.

    Args:
        model: Its module is trained in place. Where no weight asks for a gradient all are trained, else those
            that do.
        data: Texts, files, rows of a data set or token ids; see `lmopt.training.data.Data`.
        evaluation: The like, held out: its perplexity is measured every `eval_steps` and at the end, in windows
            of the block size, by `lmopt.evaluation.perplexity`.
        output: Folder for `model/` (an artefact and Hugging Face folder), `checkpoints/`, `training.json` and
            `loss.png`. With several machines it must be a folder that all see.
        config: The knobs; the defaults of `TrainingConfig` if omitted.
        loss: What to minimise; see `lmopt.training.Loss`.
        make_source: Makes another source of batches, from the configuration and the number of rows a step;
            `data` may then be `None`.
        resume: `True` goes on from the newest checkpoint in `output`, if there is one, exactly as if the run had
            not been interrupted; `"never"` removes checkpoints that are there and begins anew.
        save_model: `False` writes no `model/` and no `loss.png`: for a module that is changed once more before it
            is done, such as one with adapters.
        progress: `True` shows a bar on stderr; a function is called with `TrainingProgress` instead.

    Returns:
        The model, in evaluation mode, with losses, perplexities and speed.

    Raises:
        InputError: The data hold nothing to learn.
        ContextLengthError: `block_size` exceeds the model's context.
        UnsupportedError: The model cannot be trained as asked.
        DeviceError: The device is not there.
        ArtifactError: The checkpoint in `output` belongs to another run.
        CorruptArtifactError: It is damaged.
        DivergedError: A loss or gradient is not finite; the step is named and the last checkpoint kept.
    """
    settings = config or TrainingConfig()
    if model.facts.source is not None:
        raise UnsupportedError(
            f"{model.source} is an encoder-decoder; lmopt trains models without an encoder so far"
        )
    objective = loss or NextToken()
    if resume not in (True, "never"):
        raise InputError(f"resume is {resume!r}; expected True or 'never'")
    folder = None if output is None else _check_output(Path(output).expanduser())
    block = _block_size(model, settings)
    corpus = None if data is None else _read(model, data)
    held_out_text = None if evaluation is None else _read(model, evaluation, settings.eval_tokens)
    with ExitStack() as stack:
        accelerator = stack.enter_context(accelerated(settings))
        stack.enter_context(trainable(model.module, settings))
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(settings.seed + accelerator.process_index)
        rows = (
            settings.per_device_train_batch_size
            * settings.gradient_accumulation_steps
            * accelerator.num_processes
        )
        source = (
            _source(corpus, block, rows, settings) if make_source is None else make_source(settings, rows)
        )
        total = settings.max_steps or math.ceil(settings.num_train_epochs * source.blocks / rows)
        plain = Learner(model.module, objective)
        frozen = "" if folder is None else checkpointing.frozen_hash(plain)
        run = _prepare(model, objective, source, settings, total, accelerator)
        held_out = (
            None
            if held_out_text is None
            else HeldOut(
                run.learner.module,
                model.facts,
                held_out_text,
                max(2, min(block, held_out_text.ids.size)),
            )
        )
        save = None
        if folder is not None:
            course = checkpointing.Course(
                settings.to_dict(), objective.describe(), source.describe(), frozen, accelerator.num_processes
            )
            keeper = Keeper(run, folder / "checkpoints", course)
            keeper.begin(resume)
            save = keeper.save
        resumed_from = run.step
        tell = stack.enter_context(showing(progress, is_main=accelerator.is_main_process))
        run.finish(held_out=held_out, save=save, tell=tell)
        if settings.sharding == "full":
            take_back(model.module, run.learner.module)
        processes, is_main = accelerator.num_processes, accelerator.is_main_process
    trained = model.with_module(model.module)
    result = TrainingResult(
        model=trained,
        losses=run.journal.losses,
        parts=run.journal.parts,
        evaluations=run.journal.evaluations,
        steps=run.step,
        resumed_from=resumed_from,
        tokens=run.journal.tokens,
        corpus={
            "documents": corpus.documents if corpus else 0,
            "tokens": corpus.ids.size if corpus else 0,
            "blocks": source.blocks,
        },
        seconds=run.seconds,
        tokens_per_s=run.tokens_per_s,
        processes=processes,
        output=folder,
        loss_plot=_publish(trained, run.journal, folder)
        if is_main and folder is not None and save_model
        else None,
    )
    if is_main and folder is not None:
        told = {**result.to_dict(), "config": settings.to_dict(), "loss": dict(objective.describe())}
        draft = folder / ".training.json.tmp"
        draft.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / "training.json")
    return result


def _read(model: Model, data: Data, tokens: int | None = None) -> Corpus:
    """Read a corpus with a model's tokenizer, or the first tokens of it."""
    stated = model.generation_config.get("eos_token_id")
    eos = stated[0] if isinstance(stated, list) else stated
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        eos = model.tokenizer.eos_token_id
    found = read_corpus(data, model.tokenizer, vocab_size=model.facts.vocab_size, eos_token_id=eos)
    return found if tokens is None else Corpus(found.ids[:tokens], found.documents)


def _prepare(
    model: Model, loss: Loss, source: Source, config: TrainingConfig, total: int, accelerator: Accelerator
) -> Run:
    """Put model and loss on the device, wrap them for many processes, and make the optimiser."""
    sharded = config.sharding == "full"
    module = model.module
    if isinstance(loss, nn.Module):
        loss.to(accelerator.device)
        if sharded and any(one.requires_grad for one in loss.parameters()):
            raise UnsupportedOptionError(
                f"{type(loss).__name__} has weights to train, which sharding='full' does not spread; "
                "use sharding='none'"
            )
    module = shard(module.to("cpu"), accelerator) if sharded else module.to(accelerator.device)
    learner = Learner(module, loss, carry=config.carry_state)
    # Where the weights are spread, DDP has nothing to add: evaluation mode keeps accelerate from wrapping.
    wrapped = accelerator.prepare_model(learner, device_placement=False, evaluation_mode=sharded)
    optimizer = accelerator.prepare_optimizer(make_optimizer(learner.trained().values(), config))
    return Run(accelerator, learner, wrapped, optimizer, source, config, total, Journal())


def _source(corpus: Corpus | None, block: int, rows: int, config: TrainingConfig) -> Source:
    if corpus is None:
        raise InputError("data is None; give texts, files or token ids, or make_source")
    if config.carry_state:
        return ContiguousStreams(corpus, block, rows)
    return ShuffledBlocks(corpus, block, rows, config.seed)


def _block_size(model: Model, config: TrainingConfig) -> int:
    limit = model.facts.context_length
    if config.block_size is None:
        return min(_BLOCK, limit or _BLOCK)
    if limit is not None and config.block_size > limit:
        raise ContextLengthError(
            f"block_size is {config.block_size}; the model's context has {limit} positions. Use {limit} or less."
        )
    return config.block_size


def _check_output(folder: Path) -> Path:
    """Refuse at the start what would fail at the end."""
    target = folder / "model"
    if target.exists() and not is_artifact(target) and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactExistsError(
            f"{target} holds something that lmopt did not write, and the trained model belongs there. Choose another "
            f"output folder, or remove it first: rm -r {target}"
        )
    return folder


def _publish(model: Model, journal: Journal, folder: Path) -> Path | None:
    """Write the model as an artefact, and the picture of its losses."""
    model.save_pretrained(folder / "model", overwrite=True)
    return plot_losses(folder / "loss.png", journal.losses, journal.evaluations)
