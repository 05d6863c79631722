"""A recipe's file: written, read, edited, damaged, of another model."""

from __future__ import annotations

import pytest
from helpers import LLAMA, llama_tensors, write_checkpoint_dir

from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.errors import InputError
from nf4cli.format.config import ModuleFormat
from nf4cli.planning.recipe_file import Recipe, layout_of, load_recipe, text_of

HOSTILE = 'a"b\\c\n\x7f\u2028[x]'
RECIPE = Recipe(
    32, True,
    (ModuleFormat(64, False, ("layers.0.mlp", "*.q_proj")), ModuleFormat(128, True, (HOSTILE,))),
    ("model.layers.1.mlp.down_proj",), "0" * 32, HOSTILE,
)  # fmt: skip
GOOD = text_of(RECIPE, [("bits", 4.5), ("loss_is", "of something")])


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(GOOD, "utf-8")
    found = load_recipe(file)
    assert (found.blocksize, found.double_quant, found.keep) == (32, True, RECIPE.keep)
    assert (found.model, found.layout) == (RECIPE.model, RECIPE.layout)
    assert [(f.blocksize, f.double_quant, set(f.modules)) for f in found.formats] == [
        (f.blocksize, f.double_quant, set(f.modules)) for f in RECIPE.formats
    ]
    assert text_of(found, [("bits", 4.5), ("loss_is", "of something")]) == GOOD


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("recipe = 1", "recipe = 2", "version 2"),
        ("recipe = 1", "", "no recipe of nf4 plan"),
        ("recipe = 1", "recipe = ", "no TOML"),
        ("\n[default]", "\n[defaults]", "no 'defaults' in a recipe"),
        ("blocksize = 32 ", "blocksize = 33 ", "33 is not one of 32, 64"),
        ("blocksize = 32 ", "blocksize = 32.0 ", "32.0 is not one of"),
        ("double_quant = true", "double_quant = 1", "neither true nor false"),
        ("double_quant = true", "double_quants = true", "no 'double_quants'"),
        ('"layers.0.mlp"', "3", "no list of names"),
        ("blocksize = 32  # 4.254 bits a weight\n", "", "'blocksize' is missing"),
        ("[keep]", "[keep]\nbits = 8", "more than `modules`"),
    ],
)
def test_a_damaged_file_is_refused_in_words(tmp_path, before, after, says):
    assert before in GOOD
    file = tmp_path / "recipe.toml"
    file.write_text(GOOD.replace(before, after, 1), "utf-8")
    with pytest.raises(InputError, match=says):
        load_recipe(file)


def test_what_is_no_text_is_refused(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no TOML"):
        load_recipe(file)
    with pytest.raises(InputError, match="regular file"):
        load_recipe(tmp_path)


def test_a_recipe_is_for_models_of_the_same_layout(tmp_path):
    write_checkpoint_dir(tmp_path / "a", llama_tensors(), LLAMA)
    write_checkpoint_dir(tmp_path / "b", llama_tensors(1), LLAMA)
    fewer = llama_tensors()
    del fewer["model.layers.1.mlp.down_proj.weight"]
    write_checkpoint_dir(tmp_path / "c", fewer, LLAMA)
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    assert layout_of(a) == layout_of(b) != layout_of(c)
    recipe = Recipe(64, True, (), (), layout_of(a), "a")
    recipe.require_model(b, tmp_path / "recipe.toml")
    with pytest.raises(InputError, match=r"made for a, and the names and shapes of c's"):
        recipe.require_model(c, tmp_path / "recipe.toml")
    Recipe(64, True, (), ()).require_model(c, tmp_path / "recipe.toml")
