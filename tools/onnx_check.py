"""Checks an exported model in ONNX Runtime: the logits and greedy tokens of transformers.

    python tools/onnx_check.py --hf=EXPORTED

Converts a directory that `convert to-hf` wrote, by optimum, and continues prompts. It requires an
environment of its own, because optimum-onnx 0.1 requires transformers 4:
pip install "optimum-onnx[onnxruntime]==0.1.0" torch.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

PROMPTS = ["def read(self", "", "class Buffer:\n    def __init__", "The "]
NEW_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True)
    directory = parser.parse_args().hf

    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with tempfile.TemporaryDirectory() as converted:
        ORTModelForCausalLM.from_pretrained(directory, export=True).save_pretrained(converted)
        onnx = ORTModelForCausalLM.from_pretrained(converted)
    different, largest = 0, 0.0
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            expected, found = (model(**inputs).logits.numpy() for model in (theirs, onnx))
            texts = [
                model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS).tolist()
                for model in (theirs, onnx)
            ]
        largest = max(largest, float(np.abs(found - expected).max()))
        different += texts[0] != texts[1]
    print(
        f"{len(PROMPTS)} prompts, {NEW_TOKENS} greedy tokens each: {different} differ; logits "
        f"differ by at most {largest:.1e}"
    )
    sys.exit(different > 0 or largest > 1e-3)


if __name__ == "__main__":
    main()
