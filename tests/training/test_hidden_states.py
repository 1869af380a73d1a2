"""Hidden states: which blocks are paired, what is compared, and that hooks come off again."""

import numpy as np
import pytest
import torch
from torch import nn

from lmopt.errors import ShapeError, UnsupportedError, UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training.hidden_states import HiddenStates, uniform_pairs
from lmopt.training.objective import IGNORE, Batch
from lmopt.training.teachers import LiveTeacher


def batch() -> Batch:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 9)))
    labels = ids[:, 1:].clone()
    labels[0, :2] = IGNORE
    return Batch(ids[:, :-1].contiguous(), labels, np.arange(3), 0)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


def llama(width: int = 16, layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(2, 2, [0, 1]), (2, 4, [1, 3]), (3, 6, [1, 3, 5]), (4, 2, [0, 0, 1, 1]), (1, 12, [11])],
)
def test_uniform_pairs_end_with_the_last_blocks(student: int, teacher: int, expected: list[int]) -> None:
    assert uniform_pairs(student, teacher) == list(enumerate(expected))


def test_the_distance_is_that_of_what_the_blocks_give() -> None:
    student, teacher, read = llama(layers=2), llama(layers=3).eval(), batch()
    with torch.no_grad():
        for one in teacher.parameters():
            one.mul_(1.1)
    with HiddenStates(student, LiveTeacher(teacher), pairs=[(0, 2), (1, 0)]) as hidden:
        student(input_ids=read.input_ids, use_cache=False)
        found = hidden(read)
    # transformers' own record: the embedding comes first. The last state is behind a norm, so the last block of the
    # teacher is shown by a teacher one block deeper.
    states = [
        one.model(input_ids=read.input_ids, output_hidden_states=True, use_cache=False).hidden_states
        for one in (student, teacher)
    ]
    learnt = read.labels != IGNORE
    last: list[torch.Tensor] = []
    hook = student.model.layers[1].register_forward_hook(lambda *a: last.append(a[-1]))  # type: ignore[union-attr,index]
    other = teacher.model.layers[2].register_forward_hook(lambda *a: last.append(a[-1]))  # type: ignore[union-attr,index]
    student(input_ids=read.input_ids, use_cache=False)
    teacher(input_ids=read.input_ids, use_cache=False)
    hook.remove()
    other.remove()
    expected = 0.0
    for x, y in ((states[0][1], last[1]), (last[0], states[1][1])):
        expected += (
            float(((x - y)[learnt].detach().norm(dim=-1) / y[learnt].norm(dim=-1)).square().mean()) / 2
        )
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(found) > 0.01


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt])
def test_models_that_are_alike_have_no_distance(make: object) -> None:
    student, teacher, read = make(0), make(0), batch()  # type: ignore[operator]
    with HiddenStates(student, LiveTeacher(teacher)) as hidden:
        student(read.input_ids)
        assert float(hidden(read)) == 0
    assert hooks(student) == hooks(teacher) == 0


def test_gradients_reach_the_student_only() -> None:
    student, teacher, read = llama(), llama(), batch()
    with torch.no_grad():
        teacher.lm_head.weight.add_(1)  # type: ignore[union-attr,operator]
        teacher.model.layers[0].mlp.down_proj.weight.mul_(3)  # type: ignore[union-attr,index]
    with HiddenStates(student, LiveTeacher(teacher)) as hidden:
        student(input_ids=read.input_ids, use_cache=False)
        hidden(read).backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0  # type: ignore[union-attr,index]
    assert student.lm_head.weight.grad is None  # type: ignore[union-attr]
    assert all(one.grad is None for one in teacher.parameters())


def test_other_widths_need_a_projection_which_is_trained() -> None:
    student, teacher, read = llama(16), llama(32), batch()
    with pytest.raises(
        ShapeError, match=r"gives 16 values a token, block 0 of the teacher 32.*projection=True"
    ):
        HiddenStates(student, LiveTeacher(teacher))
    assert hooks(student) == hooks(teacher) == 0
    with HiddenStates(student, LiveTeacher(teacher), projection=True) as hidden:
        weights = list(hidden.parameters())
        assert [tuple(one.shape) for one in weights] == [(32, 16)] * 2
        student(input_ids=read.input_ids, use_cache=False)
        hidden(read).backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in weights)


def test_impossible_pairs_and_models_without_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"pair \(0, 2\).*the teacher 2"):
        HiddenStates(tiny_llama(), LiveTeacher(tiny_llama()), pairs=[(0, 2)])
    with pytest.raises(UnsupportedOptionError, match="no pair"):
        HiddenStates(tiny_llama(), LiveTeacher(tiny_llama()), pairs=[])
    with pytest.raises(UnsupportedError, match="no list of equal blocks"):
        HiddenStates(tiny_lstm(), LiveTeacher(tiny_lstm()))
