"""The two tokenizers, trained on the prompts: CLIP's byte-pair one and T5's unigram one, some 1,200 tokens each.

They are the classes of transformers, saved and loaded like any other. CLIP's pads with its end token, T5's with
``<pad>``; the transformer is given no attention mask (FLUX never is), so padding is seen in training as it is seen by
the pipeline.

Held-out names are left out: their words are spelt from pieces. Prompts are lower case: T5's tokenizer knows no
capitals."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from training.models import TEXT_LENGTH

VOCABULARY = 1200


def clip_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    blank = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 450,  # the bytes come on top
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    # An unknown byte would become the end token, where CLIP's pooled vector is read: so every byte is known.
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        for token in (byte, byte + "</w>"):
            trained["vocab"].setdefault(token, len(trained["vocab"]))
    merges = [tuple(pair) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer(prompts: Iterable[str]) -> T5Tokenizer:
    blank = T5Tokenizer(extra_ids=0).backend_tokenizer
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = blank.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789,.-'!?:;()"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    vocab = [(token, score) for token, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def tokenizers(prompts: list[str], folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Both, kept in a folder as a pipeline keeps them: trained twice they differ, since ties fall at random."""
    if not (folder / "tokenizer_2").exists():
        clip_tokenizer(prompts).save_pretrained(folder / "tokenizer")
        t5_tokenizer(prompts).save_pretrained(folder / "tokenizer_2")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")


def ids(tokenizer: CLIPTokenizer | T5Tokenizer, prompts: list[str]) -> torch.Tensor:
    """Prompts -> (N, 24) token ids, padded and cut as `FluxKontextPipeline` does it."""
    found = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return found.input_ids
