"""Recipes as files."""

import json

import pytest

from lmopt.compression import GPTQ, Quantize, load_recipe, save_recipe
from lmopt.compression.mixed import Mixed
from lmopt.compression.recipe import step_from_dict
from lmopt.errors import InputError, UnknownPluginError, UnsupportedOptionError
from lmopt.registry import steps as known

STEPS = [
    Quantize(4, 64, overrides={"*.down_proj": {"bits": 8}, "*.o_proj": None}),
    GPTQ(3, 128, symmetric=False, damping=0.05),
    Mixed(GPTQ(group_size=64), average_bits=4.75, choices=(3, 4, 8)),
]


def test_what_is_saved_is_read_again(tmp_path):
    save_recipe(STEPS, tmp_path / "r.json")
    assert load_recipe(tmp_path / "r.json") == STEPS
    assert json.loads((tmp_path / "r.json").read_text())["lmopt_recipe"] == 1


def test_the_recipe_of_an_artefact_is_read_too(tmp_path):
    manifest = {"schema": 1, "recipe": {"steps": [STEPS[0].to_dict()]}}
    (tmp_path / "lmopt.json").write_text(json.dumps(manifest))
    assert load_recipe(tmp_path / "lmopt.json") == STEPS[:1]


@pytest.mark.parametrize("name", known.names())
def test_every_step_is_known_by_its_name_and_can_be_written_and_read(name):
    kind = known.load(name)
    assert kind.name == name
    step = kind(**{"drop_blocks": {"count": 1}, "prune_heads": {"keep": 1}}.get(name, {}))
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert ":" in kind.target


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        ("{", InputError, "recipe"),
        ("[]", InputError, "lmopt_recipe"),
        ('{"lmopt_recipe": 2, "steps": [{"step": "rtn"}]}', InputError, "version"),
        ('{"lmopt_recipe": 1, "steps": []}', InputError, "no list"),
        ('{"lmopt_recipe": 1, "steps": ["rtn"]}', InputError, "step"),
        ('{"lmopt_recipe": 1, "steps": [{"step": "gptg"}]}', UnknownPluginError, "gptq"),
        ('{"lmopt_recipe": 1, "steps": [{"step": "gptq", "bit": 4}]}', UnsupportedOptionError, "bits"),
        ('{"lmopt_recipe": 1, "steps": [{"step": "gptq", "bits": 40}]}', UnsupportedOptionError, "40"),
    ],
)
def test_what_is_no_recipe_is_told(tmp_path, content, error, told):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(error, match=told):
        load_recipe(tmp_path / "r.json")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none"):
        load_recipe(tmp_path / "none.json")
