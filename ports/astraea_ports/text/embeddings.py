"""Text embeddings, kept on disk: a prompt that was read once needs no text encoder again."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from astraea_jax import files
from astraea_jax.checks import Refusal, shown
from astraea_jax.timing import timed_jit
from astraea_ports.text import t5
from astraea_ports.text.tokenizer import Tokenizer


def cache_folder() -> Path | None:
    """Where embeddings are kept unless a caller says otherwise; None where there is no home."""
    return files.cache_folder("text")


def file_of(folder: Path, text_name: str, ids: Int[np.ndarray, " M"]) -> Path:
    """The file of one prompt: named by a hash of its tokens and of what the encoder is."""
    content = hashlib.sha256(text_name.encode())
    content.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return folder / f"{content.hexdigest()}.safetensors"


def read(path: Path, shape: tuple[int, int]) -> Float[Array, "M D"] | None:
    """An embedding, or None where there is none of this shape, finite, that can be read."""
    try:
        embedding = load_file(path)["embedding"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if embedding.shape != shape or not np.isfinite(embedding).all():
        return None
    return jax.device_put(embedding)


def write(path: Path, embedding: Float[Array, "M D"]) -> None:
    """Keeps an embedding; a folder that can't be written to is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with files.replacing(path) as partial:
            save_file({"embedding": np.asarray(jax.device_get(embedding))}, partial)
    except OSError:
        return


@timed_jit()
def _encode(encoder: t5.T5Encoder, ids, mask):
    """A text's embedding with every row past the text's end set to zero, as Wan was trained."""
    embeddings = encoder(ids[None], mask[None])[0]
    return embeddings * mask[:, None].astype(embeddings.dtype)


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    width: int,
    encoder: Callable[[], t5.T5Encoder],
    *,
    cache: tuple[Path, str] | None = None,
) -> Float[Array, "B M D"]:
    """Embeddings of texts, each encoded by itself and once, so that it depends on no other.

    Args:
      texts: what to read; several may be equal.
      tokenizer: text to ids, of the length M.
      width: channels of an embedding, D.
      encoder: gives the encoder; called only if a text is not in the cache.
      cache: the folder that keeps embeddings, and the encoder's name in it.

    Raises:
      Refusal: an embedding is not finite; it is not kept.
    """
    different = list(dict.fromkeys(texts))
    tokens, module = tokenizer(different), None
    found: dict[str, Array] = {}
    for text, ids, mask in zip(different, *tokens, strict=True):
        path = None if cache is None else file_of(*cache, ids)
        embedding = None if path is None else read(path, (tokenizer.length, width))
        if embedding is None:
            module = encoder() if module is None else module
            embedding = jax.block_until_ready(_encode(module, *jax.device_put((ids, mask))))
            if not np.isfinite(jax.device_get(embedding)).all():
                raise Refusal(
                    f"the text encoder gave NaN or infinity for {shown(text)}: check its weights "
                    "and dtype"
                )
            if path is not None:
                write(path, embedding)
        found[text] = embedding
    return jnp.stack([found[text] for text in texts])
