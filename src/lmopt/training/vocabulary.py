"""Find out before a training begins whether teacher and student speak of the same tokens."""

from typing import Final

from lmopt.errors import VocabularyMismatchError
from lmopt.model import Model
from lmopt.tokenizer import Tokenizer

# Tokens that are named in a message.
_SHOWN: Final = 5
_SPECIAL: Final = ("bos_token_id", "eos_token_id", "unk_token_id")
# Two tokenizers may know the same tokens and still cut texts differently (other merges, another normaliser).
_PROBES: Final = (
    "The quick brown fox isn't 1,234.5 metres away; it's HERE!\n\n\tdef f(x): return x**2\n",
    "Größe, café, naïve — “quotes” … ½ №",
    "北京的天气 日本語テキスト مرحبا بالعالم שלום नमस्ते 🙂",
)


def require_same_vocabulary(teacher: Model, student: Model) -> None:
    """See that two models mean the same token by each id.

    Logits may be padded to different widths, as they are in models of one family; the tokenizers must agree in
    every token, in the special ids, and in how they cut texts. Without tokenizers the widths must be equal.

    Args:
        teacher: The teacher.
        student: The student.

    Raises:
        VocabularyMismatchError: They do not; the first tokens that differ are named.
    """
    if teacher.tokenizer is None or student.tokenizer is None:
        if teacher.facts.vocab_size != student.facts.vocab_size:
            raise VocabularyMismatchError(
                f"the teacher knows {teacher.facts.vocab_size} tokens, the student {student.facts.vocab_size}, and "
                "there are not two tokenizers to compare. Logits can only be compared token by token: distil on the "
                "teacher's texts instead (lmopt.training.teacher_texts)"
            )
        return
    if differences := _differences(teacher.tokenizer, student.tokenizer):
        raise VocabularyMismatchError(
            f"teacher ({teacher.source}) and student ({student.source}) do not mean the same tokens: "
            f"{'; '.join(differences)}. Logits can only be compared token by token: take a teacher of the student's "
            "family, or distil on the teacher's texts, decoded and read by the student's own tokenizer "
            "(lmopt.training.teacher_texts)"
        )


def _differences(teacher: Tokenizer, student: Tokenizer) -> list[str]:
    """Say in what two tokenizers differ; nothing where they do not."""
    theirs = {place: token for token, place in teacher.vocabulary().items()}
    ours = {place: token for token, place in student.vocabulary().items()}
    unlike = sorted(place for place in theirs.keys() | ours.keys() if theirs.get(place) != ours.get(place))
    found = []
    if unlike:
        shown = ", ".join(
            f"id {place} is {theirs.get(place)!r} and {ours.get(place)!r}" for place in unlike[:_SHOWN]
        )
        found.append(f"{len(unlike)} ids differ ({shown}{', ...' if len(unlike) > _SHOWN else ''})")
    for name in _SPECIAL:
        first, second = getattr(teacher, name), getattr(student, name)
        if first != second:
            found.append(f"{name} is {first} and {second}")
    if not unlike:
        for text in _PROBES:
            first, second = (one.encode(text, add_special_tokens=False) for one in (teacher, student))
            if first != second:
                place = next(
                    (n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
                    min(len(first), len(second)),
                )
                found.append(
                    f"{text[:20]!r}... is cut into {first[place : place + 3]} and {second[place : place + 3]} from "
                    f"token {place} on"
                )
                break
    return found
