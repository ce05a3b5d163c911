"""The tokenizer that a GGUF file describes, as transformers' own, piece by piece as the original's.

A file says which tokens there are, of which kind, and (``tokenizer.ggml.pre``) how text is cut before they are merged.
That cut isn't stored but named; the names are llama.cpp's, the patterns those of the originals' tokenizer.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers
    import transformers

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece's
# Control tokens that end a turn or a text, where no id in the metadata says so.
ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
    *("<EOT>", "</s>"),
)
MEND = "use the tokenizer of the original model's folder, and pass ids"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# llama.cpp has approximations of what is written with these two, which differ beyond ASCII.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _gpt4(digits: str) -> str:
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"


def _cased(digits: str, ending: str = "") -> str:
    """Words split where capitals begin."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """How a family's text is cut: by each pattern in turn, the matches and what lies between them being pieces.

    whole     a piece that is a token isn't made of merges
    begins    a text begins with BOS, unless the file says otherwise
    composes  the original composes characters first (NFC; llama.cpp doesn't)
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    composes: bool = False


_CUTS: dict[str, Cut] = {}
for _names, _each in {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion exaone4": Cut((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Cut((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Cut((_gpt4(r"\p{N}{1,3}"),), True, True),
    "smaug-bpe dbrx": Cut((_gpt4(r"\p{N}{1,3}"),)),
    "qwen2 deepseek-r1-qwen kormo megrez": Cut((_gpt4(r"\p{N}"),), composes=True),
    "stablelm2": Cut((_gpt4(r"\p{N}"),)),
    "tekken": Cut((_cased(r"\p{N}"),), True, True),
    "gpt-4o llama4 kanana2": Cut((_cased(r"\p{N}{1,3}", f"{_SHORT}?"),)),
    "seed-coder": Cut(
        (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
    ),
}.items():
    _CUTS.update(dict.fromkeys(_names.split(), _each))
# What files from before ``tokenizer.ggml.pre`` mean, where a family has one tokenizer only.
_FORMER = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}


def turn_ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of the tokens that end a text or a turn: those that a GGUF file names, and its control tokens of that
    meaning."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(kinds, list):
        control = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL}
        ends += [control.get(name) for name in ENDS]
    return list(dict.fromkeys(end for end in ends if end is not None))


def tokenizer_of(metadata: Mapping[str, Any], rows: int) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file with ``metadata`` and ``rows`` rows of its embedding.

    Raises ValueError naming the key that is missing, makes no sense, or asks for a tokenizer that isn't known.
    """
    import tokenizers
    import transformers

    vocabulary = _Vocabulary(metadata, rows)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        cut = _cut(metadata)
        tokenizer, begins = _byte_level(vocabulary, cut), cut.begins
    elif kind == "llama":
        tokenizer, begins = _sentence_piece(vocabulary), True
    else:
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, wanted 'gpt2' or 'llama'; {MEND}")

    special, plain = vocabulary.added()
    for tokens, is_special in ((special, True), (plain, False)):
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=is_special, normalized=False) for t in tokens])
    ends = {"bos": begins, "eos": False}
    for name, default in ends.items():
        ends[name] = vocabulary.flag(f"add_{name}_token", default)
    _frame(tokenizer, *(vocabulary.special(name) if ends[name] else None for name in ("bos", "eos")))
    named = {f"{name}_token": vocabulary.special(name) for name in ("bos", "eos", "unknown", "padding")}
    named["unk_token"], named["pad_token"] = named.pop("unknown_token"), named.pop("padding_token")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{key: token for key, token in named.items() if token is not None},
    )
    made.chat_template = _chat_template(metadata)
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(length, int) and length > 0:
        made.model_max_length = length
    return made


class _Vocabulary:
    """The lists of a file's vocabulary, checked."""

    def __init__(self, metadata: Mapping[str, Any], rows: int) -> None:
        self.metadata = metadata
        self.tokens: list[str] = self.column("tokens", str)
        if not self.tokens:
            raise ValueError("tokenizer.ggml.tokens is empty")
        if len(self.tokens) > rows:
            raise ValueError(f"tokenizer.ggml.tokens has {len(self.tokens)} tokens, but the embedding has {rows} rows")
        # A token without text can't be met in one, but has to have a name.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice")
        self.kinds: list[int] = self.column("token_type", int, [1] * len(self.tokens))
        if len(self.kinds) < len(self.tokens):
            raise ValueError(f"tokenizer.ggml.token_type has {len(self.kinds)} kinds of {len(self.tokens)} tokens")

    def column(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        values = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            found = "missing" if values is None else "no list of the right kind"
            raise ValueError(f"tokenizer.ggml.{key} is {found}; {MEND}")
        return values

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise ValueError(f"tokenizer.ggml.{key} is {value!r}, wanted true or false")
        return value

    def special(self, name: str) -> str | None:
        """The token of ``tokenizer.ggml.<name>_token_id``."""
        key = f"tokenizer.ggml.{name}_token_id"
        default = {"bos": 1, "eos": 2, "unknown": 0} if self.metadata.get("tokenizer.ggml.model") == "llama" else {}
        index = self.metadata.get(key, default.get(name))
        if index is None:
            return None
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self.tokens):
            raise ValueError(f"{key} is {index!r}, wanted one of the {len(self.tokens)} tokens")
        return self.tokens[index]

    def added(self) -> tuple[list[str], list[str]]:
        """Tokens that are found in a text as a whole: those that stand for no text, and those that do."""
        special = {self.special(name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")} - {None}
        kinds = list(zip(self.tokens, self.kinds))
        control = [token for token, kind in kinds if kind in (CONTROL, UNKNOWN) or token in special]
        return control, [token for token, kind in kinds if kind == USER_DEFINED and token not in special]


def _cut(metadata: Mapping[str, Any]) -> Cut:
    key = "tokenizer.ggml.pre"
    name = metadata.get(key)
    if name is None:
        name = _FORMER.get(str(metadata.get("general.architecture")), "default")
        warnings.warn(f"{key} is missing from the file; text is cut as by {name!r}", stacklevel=2)
    if not isinstance(name, str) or name not in _CUTS:
        raise ValueError(f"{key} is {name!r}, wanted one of {', '.join(sorted(_CUTS))}; {MEND}")
    return _CUTS[name]


def _byte_level(vocabulary: _Vocabulary, cut: Cut) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = []
    for merge in vocabulary.column("merges", str):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.ids.keys():
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, wanted two tokens that make a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=cut.whole))
    if cut.composes:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Of any two neighbours that make a token, those merge first whose token has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids, scores = vocabulary.ids, vocabulary.column("scores", (int, float))
    if len(scores) < len(ids):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} scores of {len(ids)} tokens")
    joins = []
    for token, index in ids.items():
        if vocabulary.kinds[index] in (CONTROL, UNKNOWN, BYTE):
            continue
        for at in range(1, len(token)):
            left, right = ids.get(token[:at]), ids.get(token[at:])
            if left is not None and right is not None:
                joins.append((-scores[index], left, right))
    merges = [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(joins)]
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", SPACE)]
    prefix = vocabulary.flag("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _frame(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """What ``add_special_tokens`` puts before and after a text, or each of a pair."""
    from tokenizers import processors

    def framed(part: str, kind: int) -> list[str]:
        return [f"{piece}:{kind}" for piece in (bos, part, eos) if piece is not None]

    ends = {token: tokenizer.token_to_id(token) for token in (bos, eos) if token is not None}
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=framed("$A", 0), pair=framed("$A", 0) + framed("$B", 1), special_tokens=list(ends.items())
        )


def _chat_template(metadata: Mapping[str, Any]) -> Any:
    """The template, or several by name."""
    prefix = "tokenizer.chat_template"
    plain = metadata.get(prefix)
    named = {key.removeprefix(f"{prefix}."): text for key, text in metadata.items() if key.startswith(f"{prefix}.")}
    for key, text in {"": plain, **named}.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{prefix}{key and '.'}{key} is {type(text).__name__}, wanted a string")
    if not named:
        return plain
    return named if plain is None else {"default": plain, **named}
