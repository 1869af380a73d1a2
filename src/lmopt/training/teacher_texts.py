"""Texts that a teacher writes, for a student to learn from (sequence-level distillation).

The student is then trained on them as on any text, by the next token or by the teacher's distribution of it. A pruned
model recovers best on texts like those that its teacher was trained on, and a teacher's own come nearest to them.
"""

from collections.abc import Callable, Sequence

from lmopt.errors import EmptyPromptError
from lmopt.generation import GenerationConfig
from lmopt.model import Model
from lmopt.runtime import Runtime

_AT_ONCE = 64


def teacher_texts(
    teacher: Model,
    *,
    rows: int,
    tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[list[int]]:
    """Let a teacher write texts.

    Args:
        teacher: The teacher.
        rows: Texts.
        tokens: Most tokens of each, without its prompt; a text may end earlier by an end-of-text token.
        prompts: Ids to begin with, used in turn; `None` begins each text as the tokenizer's texts begin: by its
            end-of-text token, which stands between the documents of most pre-trainings, or its first one.
        temperature: Of sampling. 1 draws from the teacher's own distribution.
        top_p: Least likely tokens beyond this share are left out; 1 leaves out none.
        seed: Row `i` draws from `seed + i`: the same texts however many are made.
        backend: Engine; `None` is torch.
        threads: Threads; `None` follows the machine.
        progress: Called with the stage's name, the texts done and their total.

    Returns:
        Rows of ids, prompt included: documents for `lmopt.training.train`. For a student with another tokenizer
        decode them with the teacher's.

    Raises:
        EmptyPromptError: No prompt is given, and the teacher has no token to begin with.

    References:
        Kim and Rush 2016, Sequence-Level Knowledge Distillation, arXiv:1606.07947.
    """
    starts = [list(one) for one in prompts] if prompts else [_start(teacher)]
    found: list[list[int]] = []
    with Runtime(teacher, backend=backend, threads=threads) as runtime:
        while len(found) < rows:
            places = range(len(found), min(rows, len(found) + _AT_ONCE))
            some = [starts[place % len(starts)] for place in places]
            config = GenerationConfig(
                max_new_tokens=tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=top_p,
                seed=[seed + place for place in places],
            )
            written = runtime.generate(some, config)
            found += [[*start, *one.token_ids] for start, one in zip(some, written, strict=True)]
            if progress is not None:
                progress("written by the teacher", len(found), rows)
    return found


def _start(teacher: Model) -> list[int]:
    known = teacher.tokenizer
    if known is None:
        raise EmptyPromptError(
            "the teacher has no tokenizer that says how a text begins; give prompts=[[first_id]]"
        )
    table = known.vocabulary()
    for token in ("<|endoftext|>", "<|end_of_text|>"):
        if token in table:
            return [table[token]]
    for one in (known.bos_token_id, known.eos_token_id):
        if one is not None:
            return [one]
    raise EmptyPromptError(
        f"the tokenizer of {teacher.source} names no token that begins a text; give prompts=[[first_id]]"
    )
