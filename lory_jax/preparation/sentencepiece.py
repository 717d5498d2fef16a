"""SentencePiece `.model` files, such as that of LLaMA 2, as `tokenizers` JSON.

The pieces, scores and rules are those that the package sentencepiece reads. A converted tokenizer
is then compared with it on texts on which conversions are known to go wrong, and refused if one of
them differs: a tokenizer that is almost right would spoil a run without a sign.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # kinds of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
NEVER = -1e6  # the score of pieces that no text may spell out, such as <s>
SPACES = ("", " ", "  ", "a", " a", "  a", "   b", "a ", "a  ", "a  b", "\n", "\ta", "a\n\n\nb")
SCRIPTS = ("Ünïcödé é", "ﬁne ①", "漢字かな交じり文", "ไทย", "שלום", "🦊👩‍👩‍👧")
SPELLED = ("<s>", "</s> <unk>", "<0x41>", "a<s>b", f"{SPACE}a{SPACE}", f" {SPACE}")
OTHERS = ("1234567890 3.14", "don't", "\n  if a:\n\treturn x", "a\r\nb", "x" * 200)
PROBES = SPACES + SCRIPTS + SPELLED + OTHERS


def load_sentencepiece(path: str | Path) -> Tokenizer:
    """Reads a `.model` file as a tokenizer with the same ids.

    Raises:
      InputError: the package sentencepiece is missing, the file is no model of it, its kind is
        neither BPE nor unigram, or the converted tokenizer gives some text other ids.
    """
    try:
        sentencepiece = importlib.import_module("sentencepiece")
        protocol = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise InputError(
            f"{path}: requires the package sentencepiece; pip install sentencepiece"
        ) from None
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
    try:
        proto = protocol.ModelProto.FromString(contents)
        original = sentencepiece.SentencePieceProcessor(model_proto=contents)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a SentencePiece model ({reason})") from None
    converted = Tokenizer(convert(proto, str(path)), str(path))
    texts = [*PROBES, *(f"a {p.piece} b" for p in proto.pieces if p.type == USER_DEFINED)]
    check_same_ids(converted, original, texts, str(path))
    return converted


def convert(proto: Any, name: str) -> str:
    """Returns the `tokenizers` JSON of a SentencePiece model; `name` is named in errors."""
    pieces, rules, trained = proto.pieces, proto.normalizer_spec, proto.trainer_spec
    if trained.model_type not in (UNIGRAM, BPE) or trained.treat_whitespace_as_suffix:
        raise InputError(
            f"{name}: must be a BPE or a unigram model with spaces at the beginning of words"
        )
    model: models.Model
    if trained.model_type == BPE:
        model = models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    else:
        model = models.Unigram(
            [(p.piece, p.score if p.type in (NORMAL, USER_DEFINED) else NEVER) for p in pieces],
            unk_id=trained.unk_id,
            byte_fallback=trained.byte_fallback,
        )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(rules))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
            for piece in pieces
            if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer.to_str()


def check_same_ids(converted: Tokenizer, original: Any, texts: Sequence[str], name: str) -> None:
    """Raises `InputError` unless both tokenizers give every text the same ids."""
    for text in texts:
        expected, found = original.encode(text), converted.encode(text)
        if expected != found:
            raise InputError(
                f"{name}: cannot be converted: {json.dumps(text)[:60]} has the ids "
                f"{expected[:8]}, after the conversion {found[:8]}; give a tokenizer.json"
            )


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, first those that give the piece of the highest score.

    SentencePiece joins whichever neighbours give the best piece, so each division of a piece into
    two others is a merge.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    found = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


def _normalizers(rules: Any) -> list[Any]:
    """What SentencePiece does to a text, in its order.

    The space before the text is put there by a normalizer, whatever the text begins with. A
    Metaspace pre-tokenizer, which other converters use, leaves out those of texts that begin with
    a space.
    """
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps
