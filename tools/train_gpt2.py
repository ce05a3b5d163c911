"""Train the small GPT-2 checkpoint that the tests load.

A randomly initialised model is a poor test subject: its logits are nearly flat, so a wrong kernel can still agree on
most quantities one would compare, and greedy decoding flips on rounding noise. This script trains a real, if small,
model whose predictions are peaked, whose biases and LayerNorm parameters have moved away from their initial values,
and whose held-out perplexity is a meaningful number to preserve.

The text is ``pydoc_data.topics`` from the standard library, so nothing has to be downloaded. Its last tenth is held
out: it is neither seen by the tokenizer nor by the optimizer, and only decides which training step is kept.

The result is an ordinary Hugging Face folder: ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it as is. Weights are
stored as fp16 to keep the committed file small, and the perplexity reported at the end is measured on the folder as
read back, not on the fp32 weights that were in memory.

Example:
    python tools/train_gpt2.py --output python_tests/data/gpt2-pydoc
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
)

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything that, together with the text, determines the result."""

    steps: int
    seed: int
    vocab_size: int = 1500
    n_layer: int = 6
    n_embd: int = 128
    n_head: int = 2  # two heads of 128 / 2 = 64, the head size of every published GPT-2
    n_positions: int = 256
    batch_size: int = 4  # so little text deserves many small updates rather than few smooth ones
    dropout: float = 0.1
    peak_learning_rate: float = 2e-3
    final_learning_rate_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    evaluate_every: int = 50
    patience: int = 6  # evaluations without improvement before training stops


def load_text() -> str:
    """Return the whole corpus; sorting makes it independent of the order in which the topics are declared."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def split_text(text: str) -> tuple[str, str]:
    """Cut off the last tenth, so that the held-out part is whole running text that training never saw."""
    cut = len(text) - round(len(text) * HELD_OUT_FRACTION)
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int, n_positions: int) -> GPT2Tokenizer:
    """Learn a byte-level BPE and wrap it in the class that GPT-2 checkpoints name.

    Naming ``GPT2Tokenizer`` rather than a generic fast tokenizer lets old and new releases of transformers load the
    folder. As in the original GPT-2, the end-of-text token takes the last id.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer=trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = learned["vocab"]
    vocab[END_OF_TEXT] = len(vocab)
    # Annotated loosely because the declared parameter type omits the list of pairs that the class does take.
    merges: Any = [(left, right) for left, right in learned["merges"]]
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=n_positions)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the token ids of a whole text; the length warning does not apply because windows are cut afterwards."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def build_model(settings: Settings, vocab_size: int) -> GPT2LMHeadModel:
    """Create an untrained GPT-2 with the stock architecture: learned positions, gelu_new, biases and a tied head."""
    end_of_text_id = vocab_size - 1
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings.n_positions,
            n_embd=settings.n_embd,
            n_layer=settings.n_layer,
            n_head=settings.n_head,
            resid_pdrop=settings.dropout,
            embd_pdrop=settings.dropout,
            attn_pdrop=0.0,  # dropout here would rule out the fast attention kernel on the CPU
            bos_token_id=end_of_text_id,
            eos_token_id=end_of_text_id,
        )
    )


def build_optimizer(model: GPT2LMHeadModel, settings: Settings) -> torch.optim.AdamW:
    """Decay only matrices: pulling biases and LayerNorm gains to zero hurts and regularises nothing."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings.peak_learning_rate,
        betas=(0.9, 0.95),
    )


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a small fraction of the peak."""
    if step < settings.warmup_steps:
        return settings.peak_learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    ratio = settings.final_learning_rate_ratio
    return settings.peak_learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@torch.inference_mode()
def held_out_loss(model: GPT2LMHeadModel, tokens: torch.Tensor) -> float:
    """Mean negative log likelihood per token, in nats, over consecutive windows of the full context length.

    Windows overlap by one token, so every token except the very first one is predicted exactly once. The context
    starts afresh in each window, which makes this a slightly pessimistic but simple and repeatable measure.
    """
    model.train(False)
    window = model.config.n_positions
    total = 0.0
    for start in range(0, len(tokens) - 1, window):
        piece = tokens[start : start + window + 1]
        logits = model(input_ids=piece[None, :-1]).logits[0].float()
        total += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
    return total / (len(tokens) - 1)


def unigram_loss(train_tokens: torch.Tensor, held_out_tokens: torch.Tensor, vocab_size: int) -> float:
    """Loss of add-one-smoothed token frequencies: what a model that ignores context would reach."""
    counts = torch.bincount(train_tokens, minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out_tokens[1:]].mean().item()


def train(
    model: GPT2LMHeadModel, train_tokens: torch.Tensor, held_out_tokens: torch.Tensor, settings: Settings
) -> tuple[int, float]:
    """Train in place and leave the model at its best held-out step; return that step and its loss.

    The corpus is small enough to be memorised, so the last step is not the best one in general.
    """
    optimizer = build_optimizer(model, settings)
    window_choice = torch.Generator().manual_seed(settings.seed)
    offsets = torch.arange(settings.n_positions + 1)
    best_step, best_loss = 0, held_out_loss(model, held_out_tokens)
    best_weights = copy.deepcopy(model.state_dict())
    evaluations_since_best = 0
    started = time.perf_counter()

    for step in range(settings.steps):
        model.train()
        starts = torch.randint(
            len(train_tokens) - settings.n_positions, (settings.batch_size, 1), generator=window_choice
        )
        batch = train_tokens[starts + offsets]
        logits = model(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()

        if (step + 1) % settings.evaluate_every and step + 1 != settings.steps:
            continue
        current = held_out_loss(model, held_out_tokens)
        print(
            f"step {step + 1:5d}  train loss {loss.item():.3f}  held-out perplexity {math.exp(current):8.2f}"
            f"  {time.perf_counter() - started:6.1f} s",
            flush=True,
        )
        if current < best_loss:
            best_step, best_loss, evaluations_since_best = step + 1, current, 0
            best_weights = copy.deepcopy(model.state_dict())
        else:
            evaluations_since_best += 1
            if evaluations_since_best >= settings.patience:
                break

    model.load_state_dict(best_weights)
    return best_step, best_loss


def save(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, output: Path) -> None:
    """Write the Hugging Face folder with fp16 weights; ``model`` itself is left in its own precision."""
    stored = copy.deepcopy(model)
    for parameter in stored.parameters():
        parameter.data = parameter.data.half()
    end_of_text_id = stored.config.eos_token_id
    stored.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "do_sample": False}
    )
    stored.save_pretrained(output)
    tokenizer.save_pretrained(output)


def check_saved(output: Path, held_out: str, prompt: str) -> tuple[float, str]:
    """Read the folder back as a user would; return its held-out loss (computed in fp32) and a greedy sample."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    if not isinstance(model, GPT2LMHeadModel):
        raise TypeError(f"{output} loads as {type(model).__name__}, not as GPT2LMHeadModel")
    loss = held_out_loss(model, encode(tokenizer, held_out))
    prompt_ids = encode(tokenizer, prompt)[None]
    generated = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=80, pad_token_id=tokenizer.eos_token_id
    )
    return loss, str(tokenizer.decode(generated[0]))


def parse_arguments() -> argparse.Namespace:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description="Train the small GPT-2 checkpoint used by the tests.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1500, help="most optimizer steps to take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; they set the order of sums, so repeating a run needs the same number (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Train, save, read back and print the facts worth writing down."""
    arguments = parse_arguments()
    settings = Settings(steps=arguments.steps, seed=arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(settings.seed)
    started = time.perf_counter()

    text = load_text()
    train_text, held_out_text = split_text(text)
    print(f"text: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}")

    tokenizer = train_tokenizer(train_text, settings.vocab_size, settings.n_positions)
    vocab_size = len(tokenizer)
    train_tokens, held_out_tokens = encode(tokenizer, train_text), encode(tokenizer, held_out_text)
    print(f"tokens: {len(train_tokens)} to train on, {len(held_out_tokens)} held out, vocabulary {vocab_size}")

    model = build_model(settings, vocab_size)
    print(f"parameters: {model.num_parameters()}")
    before = math.exp(held_out_loss(model, held_out_tokens))
    unigram = math.exp(unigram_loss(train_tokens, held_out_tokens, vocab_size))
    print(f"held-out perplexity: untrained {before:.2f}, unigram {unigram:.2f}", flush=True)

    best_step, best_loss = train(model, train_tokens, held_out_tokens, settings)
    save(model, tokenizer, arguments.output)
    saved_loss, sample = check_saved(arguments.output, held_out_text, prompt="The for statement is used to")
    trained, saved = math.exp(best_loss), math.exp(saved_loss)
    print(f"held-out perplexity: best {trained:.3f} at step {best_step}, as saved {saved:.3f}")
    print(f"folder: {sum(file.stat().st_size for file in arguments.output.iterdir())} bytes")
    print(f"seconds: {time.perf_counter() - started:.0f}")
    print(f"greedy sample:\n{sample}")


if __name__ == "__main__":
    main()
