"""A tiny T5 of random weights with a tokenizer of its own, as T5's repositories lie."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

CAPTIONS = [
    "a small red circle on a white background",
    "two large blue squares beside a green star",
    "a cat",
    "",
]
WIDTH = 16
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer, as T5's, trained on a few captions."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        CAPTIONS * 20,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0)


def write_t5(folder: Path, network: Any, *, at_root: bool = False) -> str:
    """A T5 as its repositories lie (all at the root), or as a model folder's text_encoder/ and tokenizer/."""
    network.eval().save_pretrained(folder if at_root else folder / "text_encoder")
    t5_tokenizer().save_pretrained(folder if at_root else folder / "tokenizer")
    return str(folder)


def encoder_only(**changes: Any) -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **{**T5, **changes}))
