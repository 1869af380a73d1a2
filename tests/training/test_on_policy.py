"""On-policy batches: what the student writes, what is learnt of it, and that it is the same each time."""

import numpy as np
import pytest
import torch

from lmopt import Model
from lmopt.errors import UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training.data import Corpus
from lmopt.training.distillation import Distillation
from lmopt.training.learner import Learner
from lmopt.training.objective import IGNORE, Batch, Loss
from lmopt.training.on_policy import OnPolicy
from lmopt.training.recovering import recover
from lmopt.training.steps import Distill
from lmopt.training.teacher_cache_building import build_teacher_cache
from lmopt.training.teachers import LiveTeacher


def batch(step: int = 0, rows: int = 3, length: int = 20) -> Batch:
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, length + 1)))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), np.arange(rows), step)


def policy(model: Model, **options: float) -> OnPolicy:
    loss = Distillation(LiveTeacher(tiny_llama(5)), beta=0.5)
    return OnPolicy(loss, model.facts, **{"share": 1.0, "prompt_tokens": 4, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt, tiny_lstm])
def test_rows_go_on_as_the_student_writes(make: object) -> None:
    model = Model.from_module(make())  # type: ignore[operator]
    module = model.module.train()
    given = batch()
    found = policy(model, temperature=1e-4).prepare(given, module)
    assert module.training
    assert torch.equal(found.input_ids[:, :4], given.input_ids[:, :4])
    assert bool((found.labels[:, :3] == IGNORE).all())
    # Nearly without temperature each token is the likeliest after those before it.
    with torch.no_grad():
        answer = module.eval()(found.input_ids)
    likeliest = getattr(answer, "logits", answer[0] if isinstance(answer, tuple) else answer).argmax(-1)
    learnt = found.labels != IGNORE
    assert torch.equal(found.labels[learnt], likeliest[learnt])
    assert learnt[:, 3].all()
    # Labels are the next ids, as far as the row goes.
    assert torch.equal(found.labels[:, 3:-1][learnt[:, 3:-1]], found.input_ids[:, 4:][learnt[:, 3:-1]])


def test_it_is_a_function_of_seed_and_step() -> None:
    model = Model.from_module(tiny_llama())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = policy(model, seed=1).prepare(batch(7), model.module)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(first.input_ids, policy(model, seed=1).prepare(batch(7), model.module).input_ids)
    assert not torch.equal(first.input_ids, policy(model, seed=1).prepare(batch(8), model.module).input_ids)
    assert not torch.equal(first.input_ids[0, 4:], first.input_ids[1, 4:])


def test_a_share_of_the_steps_is_the_students() -> None:
    model = Model.from_module(tiny_llama())
    one = policy(model, share=0.3)
    own = [one.prepare(given, model.module) is not given for given in map(batch, range(40))]
    assert 4 <= sum(own) <= 20
    assert not any(
        policy(model, share=0.0).prepare(given, model.module) is not given for given in map(batch, range(9))
    )


def test_what_is_behind_the_end_is_not_learnt() -> None:
    module = tiny_llama()
    model = Model.from_module(module)
    loss = policy(model)
    loss._write = lambda *_: [[5, 6], [7] * 17, [8]]  # type: ignore[method-assign]
    found = loss.prepare(batch(), module)
    assert (found.labels != IGNORE).sum(-1).tolist() == [2, 17, 1]
    assert found.labels[0, 3:5].tolist() == [5, 6]
    assert found.input_ids[0, 4:7].tolist() == [5, 6, 0]


def test_gradients_come_from_the_reading_only() -> None:
    module = tiny_llama().requires_grad_(True)
    loss = policy(Model.from_module(module))
    assert isinstance(loss, Loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, parts, _ = Learner(module, loss)(batch())
    value.backward()
    assert parts.keys() == {"distillation"}
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in module.parameters())


def test_a_student_nears_its_teacher_on_its_own_texts() -> None:
    teacher, student = Model.from_module(tiny_llama(0)), Model.from_module(tiny_llama(0))
    with torch.no_grad():
        for one in student.module.parameters():
            one.add_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0)))
    data = [np.random.default_rng(0).integers(3, VOCAB_SIZE, 2000)]
    step = Distill(max_steps=30, learning_rate=3e-3, block_size=32, batch_size=4, on_policy=1.0, beta=0.5)
    losses = recover(student, teacher, step, data=data).losses
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


def test_what_cannot_be_is_refused(tmp_path: object) -> None:
    model = Model.from_module(tiny_llama())
    with pytest.raises(UnsupportedOptionError, match="larger block_size"):
        policy(model, prompt_tokens=20).prepare(batch(), model.module)
    with pytest.raises(UnsupportedOptionError, match="share is 2"):
        policy(model, share=2)
    corpus = Corpus(np.arange(40, dtype=np.int32), 1)
    cache = build_teacher_cache(
        LiveTeacher(tiny_llama()), corpus, tmp_path / "c", block_size=8, top_k=3  # type: ignore[operator]
    )  # fmt: skip
    with pytest.raises(UnsupportedOptionError, match="not to what the student writes"):
        OnPolicy(Distillation(cache), model.facts)
