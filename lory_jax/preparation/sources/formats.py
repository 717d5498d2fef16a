"""Which format a file has, by its name, and the domain that its name gives."""

import re
from typing import NamedTuple

COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
# Kinds that hold records; every other file is a text, unless its name says that it holds data.
RECORD_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
UNCOMPRESSED_ONLY = {"parquet", "arrow"}
ACCEPTED = "text, .jsonl, .ndjson, .json, .csv or .tsv (also with .gz or .zst), .parquet or .arrow"
# Files that hold data or documents in a form that no reader here understands. As plain text they
# would either be refused one by one or, worse, be learned as they are.
_UNKNOWN = """
.7z .br .bz2 .lz4 .lzma .rar .snappy .tar .tbz2 .tgz .txz .xz .z .zip .zstd
.array_record .avro .bin .db .dta .duckdb .feather .h5 .hdf5 .idx .lance .lmdb .mat .mdb .mds
.msgpack .npy .npz .ods .orc .pickle .pkl .rdata .rds .sav .sqlite .sqlite3 .tfrecord
.tfrecords .warc .wet .wat .xls .xlsx
.ckpt .gguf .onnx .pt .pth .safetensors
.avi .bmp .class .djvu .dll .doc .docx .dylib .epub .exe .flac .gif .ico .jar .jpeg .jpg .mkv
.mobi .mov .mp3 .mp4 .o .odt .ogg .pdf .png .ppt .pptx .pyc .so .tif .tiff .wasm .wav .webm
.webp .whl
"""  # archives; tables and arrays; weights; what is no plain text
UNKNOWN = frozenset(_UNKNOWN.split())
# What tools leave beside the data.
IGNORED_NAMES = frozenset({"_SUCCESS", "_metadata", "_common_metadata"})

NUMBERING = re.compile(r"(^|[-_.])(\d+[-_.]of[-_.]\d+|\d{5,})$|^\d+$")
MEANINGLESS = frozenset({"", "data", "part", "shard"})


class Format(NamedTuple):
    """What the name of a file says about it.

    Attributes:
      kind: "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow" or "unknown".
      compression: "gz", "zst" or "".
      stem: the name without the suffixes of a format.
    """

    kind: str
    compression: str
    stem: str


def format_of(name: str) -> Format:
    """Returns the format of a file by its name, such as `c4.00001.json.gz`."""
    stem, suffix = _split_suffix(name)
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        stem, suffix = _split_suffix(stem)
    kind = RECORD_KINDS.get(suffix, "unknown" if suffix in UNKNOWN else "text")
    if compression and kind in UNCOMPRESSED_ONLY:
        kind = "unknown"
    return Format(kind, compression, stem)


def domain_of_records(stem: str, folder: str) -> str:
    """Returns the domain of records that name none: their file's name without a shard's number.

    A name that says nothing, such as `part-00001` or `000_00000`, leaves the folder's name.
    """
    while (match := NUMBERING.search(stem)) is not None:
        stem = stem[: match.start()]
    return folder if stem in MEANINGLESS else stem


def _split_suffix(name: str) -> tuple[str, str]:
    stem, dot, suffix = name.rpartition(".")
    return (stem, "." + suffix.lower()) if dot and stem else (name, "")
