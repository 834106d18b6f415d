"""Tokenizers of `transformers`: read from the files that come with a checkpoint, and written.

tokenizer.json is taken as it is. From vocab.txt (WordPiece) or vocab.json with merges.txt
(byte-level BPE) the same pipeline is built as the library builds; a SentencePiece model is left to
the library, where it is installed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as library
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from selfsup.data.tokenizer import FILE_NAME, Tokenizer
from selfsup.errors import ConfigError, DataError
from selfsup.files import write_json, write_text

PIECES = ("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model")
SPECIALS = ("pad", "unk", "cls", "sep", "mask")


def load(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: of the checkpoint.
        config: the content of its config.json.

    Raises:
        ConfigError: there is none, or it can only be converted by `transformers`.
        DataError: a file is damaged.
    """
    if (folder / FILE_NAME).is_file():
        return Tokenizer.load(folder)
    settings = _json(folder / "tokenizer_config.json")
    if (folder / "vocab.txt").is_file():
        return _checked(_wordpiece(folder / "vocab.txt", settings), folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _checked(_byte_bpe(folder, settings), folder)
    if any((folder / name).is_file() for name in PIECES):
        return _checked(_converted(folder), folder)
    raise ConfigError(
        f"{folder}: there is no tokenizer: {FILE_NAME}, vocab.txt, or vocab.json with merges.txt"
    )


def save(tokenizer: Tokenizer, folder: Path, max_length: int, *, segments: bool) -> None:
    """Writes tokenizer.json and tokenizer_config.json for `AutoTokenizer`.

    Args:
        tokenizer: ours.
        folder: where to.
        max_length: the longest row of the model.
        segments: whether the model reads segments, `token_type_ids`.

    Raises:
        StorageError: the folder cannot be written.
    """
    wrapped = library.Tokenizer.from_str(tokenizer.to_json())
    if not _same_rows(tokenizer, wrapped):
        wrapped.post_processor = _row_template(tokenizer)
        description = json.loads(tokenizer.to_json())
        description["post_processor"] = json.loads(wrapped.to_str())["post_processor"]
        write_text(folder / FILE_NAME, json.dumps(description, ensure_ascii=False))
    else:
        write_text(folder / FILE_NAME, tokenizer.to_json())
    vocabulary = tokenizer.vocabulary
    special = {
        f"{name}_token": tokenizer.token(getattr(vocabulary, name))
        for name in SPECIALS
        if getattr(vocabulary, name) >= 0
    }
    names = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": names,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.token(vocabulary.sep),
        "bos_token": special.get("cls_token", tokenizer.token(vocabulary.sep)),
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _same_rows(tokenizer: Tokenizer, wrapped: library.Tokenizer) -> bool:
    """Whether the tokenizer itself puts the tokens around a text that our rows have."""
    (ids,) = tokenizer.encode(["a"])
    return wrapped.encode("a").ids == tokenizer.row(ids)[0].tolist()


def _row_template(tokenizer: Tokenizer) -> Any:
    """What `Tokenizer.row` does, for the library."""
    vocabulary = tokenizer.vocabulary
    end = tokenizer.token(vocabulary.sep)
    specials = [(end, vocabulary.sep)]
    if tokenizer.style == "gpt":
        return processors.TemplateProcessing(
            single="$A:0", pair=f"$A:0 {end}:0 $B:1", special_tokens=specials
        )
    begin = tokenizer.token(vocabulary.cls)
    return processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, vocabulary.cls), *specials],
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a JSON file with an object ({error})") from error


def _checked(text: str, folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(text)
    if tokenizer.vocabulary.sep < 0:
        raise DataError(f"{folder}: its vocabulary has no [SEP], </s> or <|endoftext|>")
    return tokenizer


def _wordpiece(path: Path, settings: Mapping[str, Any]) -> str:
    """BERT's pipeline around a vocab.txt, one piece in each line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    names = {key: settings.get(f"{key}_token", f"[{key.upper()}]") for key in SPECIALS}
    special = {key: _content(name) for key, name in names.items()}
    missing = [name for name in special.values() if name not in vocabulary]
    if missing:
        raise DataError(f"{path}: the special tokens {', '.join(missing)} are missing")
    wrapped = library.Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    wrapped.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    wrapped.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wrapped.decoder = decoders.WordPiece(prefix="##")
    wrapped.add_special_tokens(list(special.values()))
    wrapped.post_processor = processors.BertProcessing(
        (special["sep"], vocabulary[special["sep"]]), (special["cls"], vocabulary[special["cls"]])
    )
    return wrapped.to_str()


def _byte_bpe(folder: Path, settings: Mapping[str, Any]) -> str:
    """The pipeline of GPT-2, RoBERTa and BART around vocab.json and merges.txt."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(f"{folder}: vocab.json and merges.txt do not fit ({error})") from error
    wrapped = library.Tokenizer(model)
    known, space = wrapped.get_vocab(), bool(settings.get("add_prefix_space", False))
    wrapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    wrapped.decoder = decoders.ByteLevel()
    special = [n for n in ("<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>") if n in known]
    wrapped.add_special_tokens(special)
    if "<mask>" in known:  # it swallows the space before it
        wrapped.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    if "<s>" in known and "</s>" in known:
        wrapped.post_processor = processors.RobertaProcessing(
            ("</s>", known["</s>"]), ("<s>", known["<s>"]), add_prefix_space=space
        )
    return wrapped.to_str()


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _converted(folder: Path) -> str:
    """A SentencePiece model, converted by `transformers`."""
    hint = f"{folder}: a SentencePiece tokenizer without {FILE_NAME}; converting it needs"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(f"{hint} transformers and sentencepiece: pip install both") from None
    try:
        return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer.to_str()
    except Exception as error:
        raise ConfigError(
            f"{hint} transformers with sentencepiece, which did not do it ({error})"
        ) from error
