"""Tokenizers of GGUF files: against llama.cpp token by token, and metadata that makes no sense."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from functools import cache as kept
from pathlib import Path
from typing import Any

import pytest
from models import demo_file, random_llama, write_gguf

from quicksilver_ext import QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.weights import tokenizer as module
from quicksilver_ext.weights.checkpoint import CheckpointError, load_tokenizer

BPE_NAMES = sorted(module._CUTS)
CASED = ("tekken", "gpt-4o", "llama4", "kanana2")  # of which llama.cpp has an approximation
NASTY = [
    "In 2024 it cost $3.50, or 1,000,000x as much: 12345678901",
    "Steps:\n\n1. Open.\n\n2. Go.\n\n\n3. Shut.",
    "x =  5\n\tdef f():\n        return 'it''s'  # tab\tand  two",
    "I'll we've CAN'T DON'T don\u2019t o'clock 'tis",
    "日本語のテキスト、漢字と１２３。한국어 中文",
    "👩‍👩‍👧 🇩🇪 🙂🙃 zwj",
    "e\u0301 a\u0308\u0301 composed é ä",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] a [/INST]</s> <unk>",
    "   leading and trailing   ",
    "\n\n\n \n \r\n\r\n crlf\r",
    "\u00a0nbsp\u2003em\u2028line\u200bzero\ufeff",
    "مرحبا ١٢٣ ไทย ๑๒ हिन्दी १२",
    "²³½ Ⅷ ௧ ① x² H₂O",
    "a" * 300 + "!" * 40 + " " * 33 + "b",
    "\u017f's 'S '\u017f İ ß ẞ ǅ",
    "…—“quotes” (a.b)/c\\d_e-f `code` ~^|<>+=$#@&%*",
    "CamelCaseWords andHTTPServer XMLHttpRequest2",
    "",
    " ",
]


def texts(seed: int, count: int) -> list[str]:
    """Random mixtures of what tokenizers stumble over."""
    draw = random.Random(seed)
    pool = "ab Zz's'S12\n\t .,!?-_/\\\"<>|$é日ก٣½²🙂\u00a0\u2028\r\v\x85K" + "   " + "the and In"
    made = ["".join(draw.choice(pool) for _ in range(draw.randint(1, 30))) for _ in range(count)]
    for _ in range(count):
        codes = [draw.choice((draw.randint(32, 0x2FF), draw.randint(0x370, 0xD7FF), draw.randint(0x1F300, 0x1FFFF)))
                 for _ in range(draw.randint(1, 12))]  # fmt: skip
        made.append("".join(map(chr, codes)))
    return made


@kept
def vocabulary() -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges that run across all borders of words, so that a wrong cut shows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\s\S]{1,9}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    text = [*NASTY * 20, *texts(5, 400), *(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))]
    trained.train_from_iterator(text, trainer)
    trained.save(str(path := Path(random_llama(1)) / "trained.json"))
    model = json.loads(path.read_text())["model"]
    path.unlink()
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def bpe_metadata(pre: str | None) -> dict[str, Any]:
    tokens, merges = vocabulary()
    extra = ["<|begin|>", "<|im_end|>", "[INST]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, *extra],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


def spm_metadata() -> dict[str, Any]:
    words = ["the", "and", "In", "it", "cost", "def", "return", "user", "ab", "Zz", "ll", "ve"]
    pieces = [f"\u2581{word}" for word in words] + words
    pieces += [word[:i] for word in words for i in range(2, len(word))]
    pieces += [
        "\u2581\u2581",
        "\u2581\u2581\u2581\u2581",
        "\u2581t",
        "\u2581a",
        "\u2581c",
        "日本",
        "🙂",
        "12",
        "..",
        "\n\n",
    ]
    pieces = list(dict.fromkeys(pieces))
    characters = sorted(
        {c for piece in pieces for c in piece} | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-é日本ZSI<>|[]/")
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *characters]
    tokens = [*dict.fromkeys(tokens), "[INST]"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 260) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def file_of(metadata: dict[str, Any]) -> Path:
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    return write_gguf(random_llama(1, vocab_size=len(metadata["tokenizer.ggml.tokens"]), **small), metadata=metadata)


def theirs(file: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


def assert_same_tokens(file: Path, composes: bool = False, given: Sequence[str] = (*NASTY, *texts(1, 300))) -> None:
    other, ours = theirs(file), load_tokenizer(file)
    for text in given:
        as_composed = unicodedata.normalize("NFC", text) if composes else text
        assert ours(text)["input_ids"] == other.tokenize(as_composed.encode(), add_bos=True, special=True), repr(text)
        plain = ours(text, add_special_tokens=False)["input_ids"]
        assert plain == other.tokenize(as_composed.encode(), add_bos=False, special=True), repr(text)


# --- against llama.cpp ------------------------------------------------------------------------------------------------


def test_the_demo_has_llama_cpps_tokens() -> None:
    assert_same_tokens(demo_file())


@pytest.mark.parametrize("pre", BPE_NAMES)
def test_every_cut_has_llama_cpps_tokens(pre: str) -> None:
    given = [*NASTY, *texts(1, 300)]
    if pre in CASED:
        given = [text for text in given if text.isascii()]
    assert_same_tokens(file_of(bpe_metadata(pre)), module._CUTS[pre].composes, given)


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": False}, {"add_eos_token": True}, {"add_space_prefix": False}])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_added_is_what_llama_cpp_adds(kind: str, adds: dict[str, bool]) -> None:
    metadata = bpe_metadata("llama-bpe") if kind == "gpt2" else spm_metadata()
    assert_same_tokens(file_of(metadata | {f"tokenizer.ggml.{key}": value for key, value in adds.items()}))


# --- without it -------------------------------------------------------------------------------------------------------

# Of SmolLM2's own tokenizer: digits first, then GPT-2's words.
DEMO = {
    "In 2024 it  5": [788, 216, 34, 32, 34, 36, 357, 256, 37],
}


@pytest.mark.parametrize("text", DEMO)
def test_the_demos_tokens(text: str) -> None:
    tokenizer = load_tokenizer(demo_file())
    assert tokenizer(text)["input_ids"] == DEMO[text]
    assert tokenizer.decode(DEMO[text]) == text


def pieces(pre: str, text: str) -> list[str]:
    """A text as it is cut."""
    splits = module.tokenizer_of(bpe_metadata(pre), 10**6).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in splits]


@pytest.mark.parametrize(
    ("pre", "want"),
    [
        ("gpt-2", ["ab", "12345", " ", " C", "'", "LL", " it", "'ll", "\n", "\n", "x", ".", "\n"]),
        ("smollm", ["ab", "1", "2", "3", "4", "5", " ", " C", "'", "LL", " it", "'ll", "\n", "\n", "x", ".", "\n"]),
        ("llama-bpe", ["ab", "123", "45", " ", " C", "'LL", " it", "'ll", "\n\n", "x", ".\n"]),
        ("qwen2", ["ab", "1", "2", "3", "4", "5", " ", " C", "'LL", " it", "'ll", "\n\n", "x", ".\n"]),
        ("tekken", ["ab", "1", "2", "3", "4", "5", " ", " C", "'LL", " it", "'ll", "\n\n", "x", ".\n"]),
    ],
)
def test_cuts(pre: str, want: list[str]) -> None:
    assert pieces(pre, "ab12345  C'LL it'll\n\nx.\n") == want


def test_whole_tokens_go_before_merges() -> None:
    metadata = bpe_metadata("llama-bpe")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[-1], whole = "qzxqzx", len(tokens) - 1  # no merge makes it
    metadata["tokenizer.ggml.token_type"][-1] = 1
    for pre, one in (("llama-bpe", True), ("gpt-2", False)):
        made = module.tokenizer_of(metadata | {"tokenizer.ggml.pre": pre}, 10**6)
        assert (made("qzxqzx", add_special_tokens=False)["input_ids"] == [whole]) == one


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    for metadata in (bpe_metadata("tekken"), spm_metadata() | {"tokenizer.ggml.add_eos_token": True}):
        folder = tmp_path / metadata["tokenizer.ggml.model"]
        lm = QuickSilverForCausalLM.from_pretrained(file_of(metadata))
        lm.save_pretrained(folder)
        again = load_tokenizer(folder)
        for text in NASTY:
            ids = lm.tokenizer(text)["input_ids"]
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == lm.tokenizer.decode(ids)


def test_sentence_piece_text_comes_back() -> None:
    tokenizer = load_tokenizer(file_of(spm_metadata()))
    for text in NASTY:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if "<s>" not in text:  # spaces beside special tokens aren't told apart, as in the original
            assert tokenizer.decode(ids) == text


# --- ends, templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "names", "want"),
    [
        ({"eos": 4}, [], [4]),
        ({"eos": 4, "eot": 5, "eom": 4}, [], [4, 5]),
        ({"eos": 4}, ["<|im_end|>"], [4, 20]),
        ({"eos": 20}, ["<|im_end|>"], [20]),
        ({}, ["<|eot_id|>", "<|eom_id|>"], [20, 21]),
        ({}, [], []),
    ],
)
def test_ends_of_turns(ids: dict[str, int], names: list[str], want: list[int]) -> None:
    tokens = [f"t{i}" for i in range(20)]
    metadata = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    metadata |= {
        "tokenizer.ggml.tokens": tokens + names,
        "tokenizer.ggml.token_type": [1] * 20 + [3] * len(names),
    }
    assert module.turn_ends(metadata) == want
    metadata["tokenizer.ggml.token_type"] = [1] * len(metadata["tokenizer.ggml.tokens"])  # text that only looks so
    assert module.turn_ends(metadata) == [value for value in want if value < 20 or value in ids.values()]


def test_chat_templates() -> None:
    plain = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    assert module.tokenizer_of(bpe_metadata("qwen2") | plain, 10**6).chat_template == "{{ messages[0].content }}"
    both = plain | {"tokenizer.chat_templates": ["tool"], "tokenizer.chat_template.tool": "x"}
    made = module.tokenizer_of(bpe_metadata("qwen2") | both, 10**6)
    assert made.chat_template == {"default": "{{ messages[0].content }}", "tool": "x"}
    assert module.tokenizer_of(bpe_metadata("qwen2"), 10**6).chat_template is None
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template is int, wanted a string"):
        module.tokenizer_of(bpe_metadata("qwen2") | {"tokenizer.chat_template": 3}, 10**6)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "nonsense", r"pre is 'nonsense', wanted one of .*gpt-2.*; use the tokenizer of the original"),
        ("pre", 3, "pre is 3"),
        ("model", "bert", r"model is 'bert', wanted 'gpt2' or 'llama'; use the tokenizer of the original"),
        ("model", None, "model is None"),
        ("tokens", None, "tokens is missing"),
        ("tokens", [], "tokens is empty"),
        ("tokens", [1, 2], "tokens is no list of the right kind"),
        ("tokens", ["a", "b", "a"], "tokens has 'a' twice"),
        ("token_type", [1, 1], "token_type has 2 kinds of"),
        ("merges", None, "merges is missing"),
        ("merges", ["ab"], "merges has 'ab', wanted two tokens that make a third"),
        ("merges", ["a qqqqq"], "merges has 'a qqqqq'"),
        ("bos_token_id", 10**6, "bos_token_id is 1000000, wanted one of the"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("eos_token_id", "2", "eos_token_id is '2'"),
        ("add_bos_token", 1, "add_bos_token is 1, wanted true or false"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(key: str, value: Any, message: str) -> None:
    metadata = bpe_metadata("gpt-2") | {f"tokenizer.ggml.{key}": value}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.{message}"):
        module.tokenizer_of(metadata, 10**5)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens has \d+ tokens, but the embedding has 100 rows"):
        module.tokenizer_of(bpe_metadata("gpt-2"), 100)
    with pytest.raises(ValueError, match=r"scores has 3 scores of \d+ tokens"):
        module.tokenizer_of(spm_metadata() | {"tokenizer.ggml.scores": [0.0] * 3}, 10**5)


def test_a_file_that_names_no_cut_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing from the file; text is cut as by 'default'"):
        module.tokenizer_of(bpe_metadata(None) | {"general.architecture": "llama"}, 10**5)
    with pytest.warns(UserWarning, match="text is cut as by 'gpt-2'"):
        module.tokenizer_of(bpe_metadata(None) | {"general.architecture": "gpt2"}, 10**5)


def test_a_model_runs_without_its_tokenizer() -> None:
    """An unknown tokenizer is told of when somebody wants it."""
    file = file_of(bpe_metadata("nonsense"))
    assert load_model(file).spec.vocab_size > 2000
    lm = QuickSilverForCausalLM.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"its tokenizer can't be loaded \(tokenizer\.ggml\.pre is 'nonsense'"):
        _ = lm.tokenizer
