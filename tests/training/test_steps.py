"""`Distill` in recipes: as data, by its name, and on what the steps before it leave."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lmopt import Compressor, Model
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.compression import DropBlocks, Magnitude, Quantize
from lmopt.compression.recipe import load_recipe, save_recipe, step_from_dict
from lmopt.errors import ArtifactError, UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.training.recovering import recover
from lmopt.training.steps import Distill
from lmopt.training.teacher_texts import teacher_texts

DATA = [np.random.default_rng(0).integers(0, VOCAB_SIZE, 4000)]


def distance(one: Model, other: Model) -> float:
    ids = torch.arange(60).reshape(3, 20) % VOCAB_SIZE
    with torch.no_grad():
        found = [each.module(ids) for each in (one, other)]
    p, q = (getattr(each, "logits", each[0]).log_softmax(-1) for each in found)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_comes_back_from_a_file(tmp_path: Path) -> None:
    step = Distill(
        teacher=Path("folder"),
        texts=["a.txt", Path("b.txt")],
        max_steps=7,
        train_from=3,
        training={"bf16": True},
    )
    save_recipe([DropBlocks(count=1), step], tmp_path / "r.json")
    _, back = load_recipe(tmp_path / "r.json")
    assert isinstance(back, Distill)
    assert back.to_dict() == step.to_dict()
    assert back.config == step.config
    assert (back.teacher, back.paths(), back.train_from) == ("folder", ["a.txt", "b.txt"], 3)


def test_a_model_is_written_as_its_source() -> None:
    model = Model.from_module(tiny_llama())
    assert Distill(teacher=model).to_dict()["teacher"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"alpha": 2.0}, "alpha"), ({"beta": -1.0}, "beta"), ({"temperature": 0}, "temperature"),
        ({"on_policy": 1.1}, "on_policy"), ({"top_k": 0}, "top_k"), ({"lora_rank": 0}, "lora_rank"),
        ({"top_k": 4}, "takes a folder"), ({"max_steps": 0}, "max_steps"), ({"teacher_rows": -1}, "teacher_rows"),
        ({"top_k": 4, "folder": "x", "beta": 0.5}, "forward KL"), ({"train_from": -1}, "train_from"),
        ({"train_from": 1, "lora_rank": 2}, "do not go together"),
        ({"training": {"learning_rate": 1.0}}, r"Distill\(learning_rate=...\)"),
        ({"training": {"nonsense": 1}}, "no option 'nonsense'"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(given: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=named):
        Distill(**given)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOptionError, match=named):
        step_from_dict({"step": "distill", **given})


def test_a_pruned_model_recovers_towards_the_original(tmp_path: Path) -> None:
    model = Model.from_module(tiny_llama())
    pruned = Compressor([DropBlocks(count=1)]).compress(model)
    seen: list[tuple[str, int, int]] = []
    step = Distill(max_steps=60, learning_rate=3e-3, block_size=32)
    # The calibration rows, which a model without a tokenizer reads as random ids, are what it learns on.
    small = Compressor([DropBlocks(count=1), step]).compress(model, progress=lambda *told: seen.append(told))
    assert distance(model, small) < 0.6 * distance(model, pruned)
    assert [one["step"] for one in small.recipe] == ["drop_blocks", "distill"]
    assert ("distill", 60, 60) in seen
    assert small.report is not None
    assert small.module.training is False
    assert small.facts.parameters == pruned.facts.parameters
    folder = small.save_pretrained(tmp_path / "out").path
    assert distance(small, Model.from_pretrained(folder)) == 0


def test_quantization_after_pruning_is_recovered_on_its_grid() -> None:
    model = Model.from_module(tiny_llama())
    recipe = [DropBlocks(count=1), Quantize(bits=4, group_size=16)]
    plain = Compressor(recipe).compress(model)  # type: ignore[arg-type]
    step = Distill(max_steps=60, learning_rate=3e-3, block_size=32)
    small = Compressor([*recipe, step]).compress(model)  # type: ignore[list-item]
    before, after = quantized_parts(plain.module), quantized_parts(small.module)
    assert {path: one.grid for path, one in before.items()} == {path: one.grid for path, one in after.items()}
    assert all(torch.equal(before[path].scales, one.scales) for path, one in after.items())
    assert distance(model, small) < 0.7 * distance(model, plain)


@pytest.mark.parametrize(
    "options", [{"lora_rank": 4}, {"hidden_weight": 0.5}, {"temperature": 2.0, "alpha": 0.9}]
)
def test_other_ways_recover_too(options: dict[str, float]) -> None:
    model = Model.from_module(tiny_llama())
    pruned = Compressor([Magnitude(sparsity=0.5)]).compress(model)
    step = Distill(max_steps=60, learning_rate=3e-3, block_size=32, **options)  # type: ignore[arg-type]
    result = recover(pruned, model, step, data=DATA)
    assert distance(model, result.model) < 0.7 * distance(model, pruned)
    assert distance(model, pruned) == distance(model, Compressor([Magnitude(sparsity=0.5)]).compress(model))


def test_blocks_before_the_first_that_is_trained_stay() -> None:
    model = Model.from_module(tiny_llama())
    pruned = Compressor([Magnitude(sparsity=0.3)]).compress(model)
    step = Distill(max_steps=3, learning_rate=1e-2, block_size=16, train_from=1)
    after = recover(pruned, model, step, data=DATA).model.module
    changed = {
        name
        for name, one in pruned.module.named_parameters()
        if not torch.equal(one, after.get_parameter(name))
    }
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_cached_answers_serve_a_run_that_goes_on(tmp_path: Path) -> None:
    model = Model.from_module(tiny_llama())
    pruned = Compressor([Magnitude(sparsity=0.5)]).compress(model)
    step = Distill(
        max_steps=40,
        learning_rate=3e-3,
        block_size=32,
        top_k=32,
        folder=tmp_path,
        training={"save_steps": 10},
    )
    first = recover(pruned, model, step, data=DATA)
    assert distance(model, first.model) < 0.7 * distance(model, pruned)
    assert (tmp_path / "teacher" / "teacher.json").is_file()
    again = recover(pruned, model, step, data=DATA)
    assert (again.resumed_from, again.losses) == (40, first.losses)
    assert distance(first.model, again.model) == 0
    # Another student of the same shape would be given the weights of the first one.
    other = Compressor([Magnitude(sparsity=0.4)]).compress(model)
    with pytest.raises(ArtifactError, match="'student'"):
        recover(other, model, step, data=DATA)


def test_adapters_begin_by_the_seed_and_leave_the_callers_random_numbers_alone() -> None:
    model = Model.from_module(tiny_llama())
    pruned = Compressor([DropBlocks(count=1)]).compress(model)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        step = Distill(max_steps=2, learning_rate=1e-2, block_size=16, lora_rank=2, seed=seed)
        found.append(recover(pruned, model, step, data=DATA))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0].losses == found[1].losses != found[2].losses
    assert distance(found[0].model, found[1].model) == 0


def test_a_teacher_writes_what_is_learnt() -> None:
    model = Model.from_module(tiny_llama())
    rows = teacher_texts(model, rows=70, tokens=12, prompts=[[1, 5], [1, 9]], seed=4)
    assert len(rows) == 70
    assert [row[:2] for row in rows[:3]] == [[1, 5], [1, 9], [1, 5]]
    assert all(len(row) == 14 or row[-1] == 2 for row in rows)
    # The same texts, however many are made.
    assert teacher_texts(model, rows=3, tokens=12, prompts=[[1, 5], [1, 9]], seed=4) == rows[:3]
    # Drawn from the teacher: its texts are likelier to it than another's.
    other = teacher_texts(Model.from_module(tiny_llama(1)), rows=70, tokens=12, prompts=[[1, 5]], seed=4)

    def likelihood(texts: list[list[int]]) -> float:
        total = 0.0
        for row in texts:
            ids = torch.tensor([row])
            log_p = model.module(input_ids=ids).logits.log_softmax(-1)[0, 1:-1]
            total += float(log_p.gather(-1, ids[0, 2:, None]).detach().mean())
        return total / len(texts)

    assert likelihood(rows) > likelihood(other) + 0.2
