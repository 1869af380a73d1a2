"""Recover a compressed model towards its teacher, in the form that it has: dense, pruned or quantized."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmopt.backends.torch.calibration import find_stack
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.model import Model
from lmopt.training.data import Corpus, Data, read_corpus
from lmopt.training.distillation import Distillation
from lmopt.training.entrance import train
from lmopt.training.hidden_states import HiddenStates
from lmopt.training.lora import adapters
from lmopt.training.objective import Loss
from lmopt.training.on_policy import OnPolicy
from lmopt.training.progress import Progress
from lmopt.training.pruned import keeping_zeros
from lmopt.training.quantization_aware import close_grid, open_grid
from lmopt.training.result import TrainingProgress, TrainingResult
from lmopt.training.steps import Distill
from lmopt.training.teacher_cache_building import build_teacher_cache
from lmopt.training.teacher_texts import teacher_texts
from lmopt.training.teachers import LiveTeacher, Teacher
from lmopt.training.vocabulary import require_same_vocabulary


def recover(
    student: Model,
    teacher: Model,
    step: Distill,
    *,
    data: Data = None,
    evaluation: Data = None,
    progress: Progress = False,
) -> TrainingResult:
    """Train a copy of a student to answer as its teacher does.

    Args:
        student: The model to recover; it is left as it is.
        teacher: What to learn from. Its weights are not changed; on a GPU they are moved there.
        step: How; its own `teacher` and `texts` are not looked at.
        data: What to learn on, as for `lmopt.training.train`; `None` where the teacher writes it.
        evaluation: Held-out text, as for `lmopt.training.train`. While it trains, a quantized model is measured in
            the values that it will have, one with adapters before they are merged.
        progress: As for `lmopt.training.train`.

    Returns:
        As from `lmopt.training.train`, with the recovered model.

    Raises:
        VocabularyMismatchError: The two do not mean the same tokens.
        UnsupportedOptionError: The step does not fit the model.
        InputError: There is no text to learn on.
    """
    require_same_vocabulary(teacher, student)
    folder = None if step.folder is None else Path(step.folder).expanduser()
    corpus = _corpus(student, teacher, step, data)
    copied = student.with_module(copy.deepcopy(student.module))
    with ExitStack() as stack:
        # Adapters begin at random: by the seed, and without a trace in the caller's random numbers.
        stack.enter_context(torch.random.fork_rng([]))
        torch.manual_seed(step.seed)
        live = LiveTeacher(teacher.module.eval(), teacher.fingerprint())
        loss = _loss(copied, live, step, corpus, folder, stack)
        stack.enter_context(prepared(copied, step))
        result = train(
            copied,
            corpus,
            evaluation=evaluation,
            output=folder,
            config=step.config,
            loss=loss,
            save_model=False,
            progress=progress,
        )
    return replace(result, model=student.with_module(copied.module.eval(), recipe=[step.to_dict()]))


@contextmanager
def prepared(model: Model, step: Distill) -> Iterator[None]:
    """Make a model ready for a recovery in its own form, and bring it back to that form afterwards.

    Args:
        model: Its module is changed in place.
        step: Says which weights are trained.

    Raises:
        UnsupportedOptionError: Something is asked for that this form cannot do.
    """
    module, quantized = model.module, bool(quantized_parts(model.module))
    if step.learn_scales and (step.lora_rank is not None or not quantized):
        raise UnsupportedOptionError(
            "learn_scales trains the scales of a quantized model by straight-through rounding; this one "
            + ("is trained by adapters: leave lora_rank out" if quantized else "is not quantized")
        )
    if step.lora_rank is not None:
        with adapters(module, model.facts.vocab_size, rank=step.lora_rank):
            yield
        return
    asked = {one: one.requires_grad for one in module.parameters()}
    if quantized:
        open_grid(module, learn_scales=step.learn_scales)
    if quantized or not any(asked.values()):
        module.requires_grad_(True)
    if step.train_from is not None:
        _freeze_before(module, step.train_from)
    try:
        with ExitStack() as stack:
            if step.keep_zeros and not quantized:
                zeros = stack.enter_context(keeping_zeros(module, model.facts.vocab_size))
                if zeros and step.config.sharding == "full":
                    raise UnsupportedOptionError(
                        f"{len(zeros)} linears hold zeros that are to stay, which sharding='full' cannot see to; use "
                        "sharding='none' (DDP), or keep_zeros=False"
                    )
            yield
    finally:
        if quantized:
            close_grid(module)
        for one in module.parameters():
            one.requires_grad_(asked.get(one, False))


def _freeze_before(module: nn.Module, place: int) -> None:
    stack = find_stack(module)
    if stack is None or place >= len(stack[1]):
        has = "no list of equal blocks" if stack is None else f"{len(stack[1])} blocks"
        raise UnsupportedOptionError(f"train_from is {place}, but {type(module).__name__} has {has}")
    module.requires_grad_(False)
    for block in list(stack[1])[place:]:
        block.requires_grad_(True)


def apply_distill(module: nn.Module, step: Distill, setting: Setting) -> nn.Module:
    """Apply `lmopt.training.steps.Distill` to a copy of a module.

    Args:
        module: What the steps before have left; it is only read.
        step: The step.
        setting: The models, calibration rows, and whom to tell.

    Raises:
        UnsupportedOptionError: There is nothing to recover: the step comes first and names no teacher.
        InputError: There is no text to learn on.
        VocabularyMismatchError: Teacher and student do not mean the same tokens.
    """
    teacher = step.teacher if step.teacher is not None else setting.original
    if teacher is None or (step.teacher is None and setting.original is setting.current):
        raise UnsupportedOptionError(
            "Distill recovers what the steps before it have cost, and there is none. Put it behind them: "
            "Compressor([DropBlocks(count=6), Distill()]), or name a teacher: Distill(teacher='folder')"
        )
    if not isinstance(teacher, Model):
        teacher = Model.from_pretrained(teacher)
    student: Model = setting.current
    data: Data = [Path(one) for one in step.paths()] or None
    if data is None and len(setting.rows):
        data = [row.tolist() for row in setting.rows]

    def tell(one: TrainingProgress) -> None:
        setting.progress(step.name, one.step, one.total)

    return recover(student, teacher, step, data=data, progress=tell).model.module


def _loss(
    student: Model, live: LiveTeacher, step: Distill, corpus: Corpus, folder: Path | None, stack: ExitStack
) -> Loss:
    """Make what is minimised."""
    teacher: Teacher = live
    if step.top_k is not None:
        assert folder is not None
        teacher = build_teacher_cache(
            live,
            corpus,
            folder / "teacher",
            block_size=step.block_size,
            top_k=step.top_k,
            temperature=step.temperature,
            batch_rows=step.batch_size,
            bf16=step.config.bf16,
            device="cuda" if torch.cuda.is_available() and step.config.device != "cpu" else "cpu",
        )
    hidden = None
    if step.hidden_weight > 0:
        hidden = stack.enter_context(HiddenStates(student.module, live))
    loss = Distillation(
        teacher,
        temperature=step.temperature,
        alpha=step.alpha,
        beta=step.beta,
        hidden=hidden,
        hidden_weight=step.hidden_weight,
        student="" if folder is None else student.fingerprint(),
    )
    if step.on_policy > 0:
        return OnPolicy(loss, student.facts, share=step.on_policy, seed=step.seed)
    return loss


def _corpus(student: Model, teacher: Model, step: Distill, data: Data) -> Corpus:
    """Read the texts, and let the teacher write some if it is asked to."""
    parts: list[Any] = []
    if data is not None:
        parts += [data] if isinstance(data, str | Path | Corpus) else list(data)
    if len(parts) == 1 and isinstance(parts[0], Corpus) and not step.teacher_rows:
        return parts[0]
    if step.teacher_rows:
        parts += teacher_texts(teacher, rows=step.teacher_rows, tokens=step.block_size, seed=step.seed)
    if not parts:
        raise InputError(
            "there is no text to learn on: give Distill(texts='book.txt'), let the teacher write some with "
            "Distill(teacher_rows=500), or give compress(model, calibration='book.txt')"
        )
    return read_corpus(parts, student.tokenizer, vocab_size=student.facts.vocab_size)
