"""Prompt cleaning and tokenizing, and what happens to prompts that don't fit the vocabulary."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from tokenizers import decoders, models, pre_tokenizers, processors

from astraea_ports import tiny
from astraea_ports.text.tokenizer import Tokenizer, clean_prompt

FIXTURES = Path(__file__).parent / "fixtures"
TINY = tiny.FOLDER / "tokenizer"

# Every word of the captions that the shipped model was trained on.
GRAMMAR = """
a an and animation background backdrop wall of video short clip over on in front against to the
circle disc ball square box triangle star ring hoop donut cross plus sign
red orange yellow green blue purple white black pink brown grey teal
moving left sliding drifting right up rising upwards going down falling downwards spinning rotating
turning around growing getting bigger expanding shrinking smaller bouncing jumping
plain striped checkered dotted big large small tiny quickly fast slowly
shiny nice little lovely bright single simple cute pretty cool funny glossy solid cartoon toy paper
plastic clean clear happy strange smooth fancy
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped tokenizer, to break."""
    return Path(shutil.copytree(TINY, tmp_path / "tokenizer"))


def configure(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", json.loads((FIXTURES / "wan/prompt_clean.json").read_text()))
def test_cleaning_as_recorded(case):
    raw, cleaned = case
    assert clean_prompt(raw) == cleaned


def test_cleaning_refuses_what_is_no_text(as_a_user):
    with pytest.raises(ValueError, match="expected a prompt as a string, got None"):
        clean_prompt(None)


@pytest.mark.parametrize("name", ["square", "wide"])
def test_ids_as_recorded(tokenizer, name):
    with safe_open(FIXTURES / f"tiny_wan/{name}.safetensors", "numpy") as fixture:
        metadata = fixture.metadata()
        got = tokenizer([metadata["prompt"], metadata["negative_prompt"]])
        np.testing.assert_array_equal(got.ids, fixture.get_tensor("ids"))
        np.testing.assert_array_equal(got.mask, fixture.get_tensor("mask"))
    assert got.ids.dtype == got.mask.dtype == np.int32


def test_prompts_are_cleaned(tokenizer):
    messy = tokenizer(["  a red\n\tcircle&amp;#33; "])
    np.testing.assert_array_equal(messy.ids, tokenizer(["a red circle!"]).ids)


def test_empty_prompt_is_the_end_token(tokenizer):
    got = tokenizer([""])
    assert got.ids[0].tolist() == [1] + [0] * 47
    assert got.mask[0].tolist() == [1] + [0] * 47
    assert tokenizer([]).ids.shape == (0, 48)


def test_longest_prompt_fits(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = tokenizer(["red " * 47])
    assert got.mask.all()
    assert got.ids[0, -1] == 1


def test_truncation_says_what_is_lost(tokenizer):
    prompt = "red " * 45 + "zebra moving left"
    message = r"has 54 tokens, the limit is 48 \(with the end token\): dropped 'zebra moving left';"
    with pytest.warns(UserWarning, match=message):
        got = tokenizer(["", prompt])
    assert got.mask[1].all()
    assert got.ids[1, -1] == 1
    # Cut through the word zebra: its first letters are kept.
    np.testing.assert_array_equal(got.ids[1, :45], tokenizer(["red " * 45]).ids[0, :45])


def test_stored_padding_and_truncation_are_ignored(folder, tokenizer):
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(3)
    stored.enable_padding(length=5)
    stored.save(str(folder / "tokenizer.json"))
    prompt = "a big red circle moving left"
    again = Tokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(again([prompt]).ids, tokenizer([prompt]).ids)


def test_length(folder):
    assert Tokenizer.from_pretrained(folder, length=7)(["a red circle"]).ids.shape == (1, 7)
    configure(folder, model_max_length=10**30)
    with pytest.raises(ValueError, match=r"model_max_length in 2\.\..*pass length="):
        Tokenizer.from_pretrained(folder)
    assert Tokenizer.from_pretrained(folder, length=9).length == 9


def test_special_tokens_as_mappings(folder, tokenizer):
    configure(folder, eos_token={"content": "</s>", "lstrip": False})
    again = Tokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(again(["a"]).ids, tokenizer(["a"]).ids)


@pytest.mark.parametrize("word", GRAMMAR.split())
def test_grammar_is_known(tokenizer, word):
    assert tokenizer.unknown_words(word) == ()


def test_unknown_words(tokenizer):
    prompt = "A blue zebra, in front of a Bicycle over zebra Blue's 猫 wall 42 ünï!"
    assert tokenizer.unknown_words(prompt) == ("zebra", "Bicycle", "猫", "ünï")
    assert tokenizer.unknown_words("") == ()


def test_a_word_is_not_blamed_for_the_sign_that_it_touches(tokenizer):
    assert tokenizer.unknown_words("a red circle→ moving") == ("→",)
    assert tokenizer.unknown_words("a “red” circle—moving") == ()
    assert tokenizer.unknown_words("zebra→") == ("→", "zebra")


def test_unknown_words_of_a_large_vocabulary():
    """The rule knows no model: pieces of a word are no spelling, nor are signs that are words."""
    pieces = ["▁", "▁kay", "aks", "▁the", "猫", "x", "q", "z", "▁x"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    names = ["<pad>", "</s>", "<unk>", *bytes_, *pieces]
    backend = tokenizers.Tokenizer(
        models.Unigram([(name, -1.0) for name in names], unk_id=2, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = Tokenizer(backend, length=8, pad="<pad>", end="</s>", unknown="<unk>")
    assert tokenizer.unknown_words("the kayaks 猫 xqz 犬 x") == ("xqz", "犬")


def test_refuses_what_is_no_list_of_prompts(as_a_user, tokenizer):
    with pytest.raises(ValueError, match=r"got one string; pass \[prompt\]"):
        tokenizer("a red circle")
    with pytest.raises(ValueError, match="expected a prompt as a string, got 3"):
        tokenizer(["a", 3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"expected the file .*tokenizer\.json"),
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer_config.json", None, r"expected the file .*tokenizer_config\.json"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
    ],
)
def test_broken_folder(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


def test_special_tokens_must_be_there(folder):
    configure(folder, pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"the vocabulary has no \['\[PAD\]'\]"):
        Tokenizer.from_pretrained(folder)
    configure(folder, pad_token="</s>", eos_token="<pad>")
    with pytest.raises(ValueError, match=r"to end every prompt with <pad>, got \['</s>'\]"):
        Tokenizer.from_pretrained(folder)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
