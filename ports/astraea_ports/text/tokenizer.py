"""Prompts to token ids, as Wan's text encoder was trained to read them.

Source: https://github.com/Wan-Video/Wan2.1 `wan/modules/tokenizers.py` (cleaning, padding).
"""

import html
import itertools
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from astraea_jax import checks, files
from astraea_jax.checks import Refusal, shown
from astraea_ports import checkpoints
from astraea_ports.checkpoints import configs
from astraea_ports.checkpoints.configs import LONGEST_TEXT

FILE_BYTES = 200 << 20
"""The largest tokenizer.json that is read; UMT5's has 17 MB."""


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, undoes HTML escapes (twice), makes runs of white space one space.

    Raises:
      Refusal: the text is no string.
    """
    import ftfy  # slow to import, and only prompts need it

    if not isinstance(text, str):
        raise Refusal(f"expected a prompt as a string, got {shown(text)}")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class TokenIds(NamedTuple):
    """Prompts in token ids, padded at the end to one length.

    Attributes:
      ids: 0..vocabulary size - 1.
      mask: 1 for tokens (the end token is one), 0 for padding.
    """

    ids: Int[np.ndarray, "B L"]
    mask: Int[np.ndarray, "B L"]


class Tokenizer:
    """A `tokenizers` tokenizer with a fixed length, an end token and padding."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, length: int, pad: str, end: str, unknown: str | None
    ):
        """Wraps a tokenizer; `from_pretrained` is the usual way to make one.

        Args:
          backend: what turns text into tokens. Its own padding and truncation are switched off.
          length: tokens per prompt, the end token included.
          pad: the token that fills up.
          end: the token that `backend` puts at the end of a prompt.
          unknown: the token for what the vocabulary can't spell, if there is one.

        Raises:
          Refusal: a token is not in the vocabulary, or the backend doesn't end a prompt with
            `end`.
        """
        backend.no_padding()
        backend.no_truncation()
        named = (pad, end) if unknown is None else (pad, end, unknown)
        ids = {token: backend.token_to_id(token) for token in named}
        lacking = [token for token, token_id in ids.items() if token_id is None]
        if lacking:
            raise Refusal(f"the vocabulary has no {lacking}; check tokenizer_config.json")
        if backend.encode("").ids[-1:] != [ids[end]]:
            raise Refusal(
                f"expected the tokenizer to end every prompt with {end}, got "
                f"{backend.encode('').tokens} for an empty one; check tokenizer.json"
            )
        self.length = length
        self._num_tokens = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._backend = backend
        self._pad, self._end = ids[pad], ids[end]
        self._unknown = None if unknown is None else ids[unknown]
        self._config = {"pad_token": pad, "eos_token": end, "unk_token": unknown}

    @property
    def num_tokens(self) -> int:
        """Ids are below this."""
        return self._num_tokens

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, length: int | None = None
    ) -> "Tokenizer":
        """Reads tokenizer.json and tokenizer_config.json.

        Args:
          folder: where they lie.
          length: tokens per prompt; None takes `model_max_length`. It is part of the model: padding
            takes part in its attention.

        Raises:
          Refusal: a file is missing or broken, or nothing says the length.
        """
        config = _read_config(folder)
        length = _stated_length(config) if length is None else length
        if length is None:
            raise Refusal(
                f"expected model_max_length in 2..{LONGEST_TEXT} in "
                f"{Path(folder)}/tokenizer_config.json, got {config.get('model_max_length')}; "
                "pass length="
            )
        checks.whole("length", length, 2, LONGEST_TEXT, unit="tokens")
        path = Path(folder) / "tokenizer.json"
        if not os.path.lexists(path):
            raise Refusal(
                f"expected the file {path}; make it from other formats with transformers' "
                "AutoTokenizer(...).save_pretrained"
            )
        files.check_input(path, what="tokenizer", largest=FILE_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            backend.encode("")
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # bare Exceptions, and panics that are not even those
            raise Refusal(f"{path} is no tokenizer ({error}); fetch it again") from error
        return cls(
            backend,
            length=length,
            pad=_special(config, "pad_token") or "<pad>",
            end=_special(config, "eos_token") or "</s>",
            unknown=_special(config, "unk_token"),
        )

    def __call__(self, prompts: Sequence[str]) -> TokenIds:
        """Token ids of prompts, cleaned first (see `clean_prompt`); an empty prompt is legal.

        Warns:
          UserWarning: a prompt is too long; its last words are dropped, the end token is kept.

        Raises:
          Refusal: the prompts are no sequence of strings.
        """
        if isinstance(prompts, str):
            raise Refusal("expected a sequence of prompts, got one string; pass [prompt]")
        if not isinstance(prompts, Sequence | np.ndarray):
            raise Refusal(f"expected a sequence of prompts, got {shown(prompts)}")
        ids = np.full((len(prompts), self.length), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(map(clean_prompt, prompts)):
            encoding = self._backend.encode(prompt)
            kept = encoding.ids
            if len(kept) > self.length:
                kept = [*kept[: self.length - 1], self._end]
                # The word that the cut goes through is lost too.
                cut = encoding.offsets[self.length - 1][0]
                words = [m[0] for m in re.finditer(r"\S+", prompt) if m.end() > cut]
                warnings.warn(
                    f"a prompt has {len(encoding.ids)} tokens, the limit is {self.length} (with "
                    f"the end token): dropped {shown(' '.join(words))}; shorten it",
                    UserWarning,
                    stacklevel=2,
                )
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
        return TokenIds(ids, mask)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what `from_pretrained` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = self._config | {"model_max_length": self.length}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """The words of a prompt that the vocabulary can only spell, or not even that; each once.

        A word is spelled if its tokens stand for fewer than two letters each, on average (in
        scripts without capitals, where one sign may be a word: for less than one).
        """
        found: dict[str, None] = {}
        for word in clean_prompt(prompt).split():
            if self._has_unknown(word):
                # Only the part that can't be spelled is named, not the word that it touches; and
                # a mark between words is no word.
                parts = [(kind, "".join(signs)) for kind, signs in itertools.groupby(word, _kind)]
                blamed = [each for each in parts if self._has_unknown(each[1])] or [("L", word)]
                found.update(dict.fromkeys(part for kind, part in blamed if kind != "P"))
            runs = re.findall(r"[^\W\d_]+", word)  # letters only: digits are always spelled
            found.update(dict.fromkeys(run for run in runs if self._is_spelled(run)))
        return tuple(found)

    def _has_unknown(self, word: str) -> bool:
        return self._unknown in self._backend.encode(word, add_special_tokens=False).ids

    def _is_spelled(self, word: str) -> bool:
        encoding = self._backend.encode(word, add_special_tokens=False)
        num_tokens = len(encoding.ids)
        if word.lower() != word.upper():
            return num_tokens > 1 and 1 < len(word) < 2 * num_tokens
        # A word's start may be a token by itself, with the span of the letter after it.
        marked = encoding.offsets[:1] == encoding.offsets[1:2]
        return num_tokens - marked > len(word)


class _Token:
    """A special token: its text, or (of older files) a mapping with that as `content`."""

    def problem(self, value: Any) -> str | None:
        """See `checks.Rule`."""
        token = value.get("content") if isinstance(value, Mapping) else value
        return None if token is None and value is None else checks.Text(200).problem(token)


class _Length:
    """Tokens per prompt; null or a number past the longest (10^30, as a rule) for no limit."""

    def problem(self, value: Any) -> str | None:
        """See `checks.Rule`."""
        if value is None or checks.Number(LONGEST_TEXT + 1, 1e31).problem(value) is None:
            return None
        return checks.Whole(2, LONGEST_TEXT, "tokens, or null for no limit").problem(value)


_RULES = {
    "model_max_length": _Length(),
    "pad_token": _Token(),
    "eos_token": _Token(),
    "unk_token": _Token(),
    "padding_side": checks.OneOf(("right",)),
    "truncation_side": checks.OneOf(("right",)),
    # What tokenizer.json holds, or of other programs.
    "bos_token": _Token(),
    "additional_special_tokens": checks.OrNone(checks.ListOf(_Token(), 0, 10_000)),
    "added_tokens_decoder": checks.ByName(checks.ByName(checks.Anything()), most=10_000),
    "extra_ids": checks.Whole(0, 10_000),
    "sp_model_kwargs": checks.OrNone(checks.ByName(checks.Anything())),
    "legacy": checks.OrNone(checks.Flag()),
    "clean_up_tokenization_spaces": checks.OrNone(checks.Flag()),
    "spaces_between_special_tokens": checks.OrNone(checks.Flag()),
    "tokenizer_class": checks.OrNone(checks.Text()),
    "backend": checks.OrNone(checks.Text()),
}
"""The fields of tokenizer_config.json. Transformers' own are many more, and let through."""


def _read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    name = "tokenizer_config.json"
    values = checkpoints.read_config(folder, name)
    return configs.read(values, _RULES, name=str(Path(folder) / name), others=True)


def _stated_length(config: Mapping[str, Any]) -> int | None:
    """Tokens per prompt; None where the file states no limit, which it may write as 10^30."""
    stated = config.get("model_max_length")
    return None if stated is None or stated > LONGEST_TEXT else stated


def stated_length(folder: str | os.PathLike[str]) -> int | None:
    """Tokens per prompt as a tokenizer's own files state them; None where they state no limit.

    Raises:
      Refusal: tokenizer_config.json is missing or broken, or a field is not as it must be.
    """
    return _stated_length(_read_config(folder))


def _kind(sign: str) -> str:
    """L for letters and the marks upon them, N for digits, else what kind of sign it is."""
    kind = unicodedata.category(sign)[0]
    return "L" if kind == "M" else kind


def _special(config: Mapping[str, Any], name: str) -> str | None:
    """A special token's text."""
    token = config.get(name)
    return token.get("content") if isinstance(token, Mapping) else token
