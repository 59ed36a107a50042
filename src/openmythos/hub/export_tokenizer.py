"""A run's tokenizer as files of Hugging Face: tokenizer.json and tokenizer_config.json.

They encode like `inference.text.Engine`: the start token, then the text. The same files load with
`openmythos.data.tokenizer.load_tokenizer`, except those of a task, whose tokens are words.
"""

import json
from typing import Any

from openmythos.data.tokenizer import BOS, ByteTokenizer, Tokenizer, byte_alphabet
from openmythos.tasks import Task
from openmythos.tasks.words import PAD, words

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json; a tokenizer of bytes becomes BPE without merges."""
    if isinstance(tokenizer, ByteTokenizer):
        data = _bytes_json()
    else:
        data = json.loads(tokenizer.serialized())
    bos = bos_name(tokenizer)
    # Replaces the file's own, which our own encoding ignores as well.
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special(bos, 0), _sequence("A", 0)],
        "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    return data


def bos_name(tokenizer: Tokenizer) -> str:
    """The text of the start token."""
    if isinstance(tokenizer, ByteTokenizer):
        return BOS
    added = json.loads(tokenizer.serialized())["added_tokens"]
    return next(str(token["content"]) for token in added if token["id"] == tokenizer.bos_id)


def text_config(bos: str, context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json; the start token also ends a text, and pads."""
    return _config(context) | {"bos_token": bos, "eos_token": bos, "pad_token": bos}


def task_config(task: Task, context: int) -> dict[str, Any]:
    """tokenizer_config.json for the tokens of a task."""
    known = words(task)
    # lm-eval wants a token that ends texts.
    pad = PAD if PAD in known else known[0]
    return _config(context) | {"pad_token": pad, "eos_token": pad}


def _config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        # The name of a special token in a text is text, as in training.
        "split_special_tokens": True,
    }


def task_json(task: Task) -> dict[str, Any]:
    """tokenizer.json for the tokens of a task: words between spaces."""
    return _tokenizer(
        model={
            "type": "WordLevel",
            "vocab": {word: token for token, word in enumerate(words(task))},
            "unk_token": "",  # not in the vocabulary: an unknown word is an error
        },
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder=None,
        added=[],
    )


def _bytes_json() -> dict[str, Any]:
    return _tokenizer(
        model={
            "type": "BPE",
            "vocab": byte_alphabet() | {BOS: ByteTokenizer.bos_id},
            "merges": [],
        },
        pre_tokenizer={
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        added=[
            {
                "id": ByteTokenizer.bos_id,
                "content": BOS,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
    )


def _tokenizer(
    *, model: dict[str, Any], pre_tokenizer: Any, decoder: Any, added: list[Any]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _special(name: str, segment: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": segment}}


def _sequence(name: str, segment: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": segment}}
