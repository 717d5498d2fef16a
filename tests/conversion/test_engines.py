"""Exports in engines other than transformers: the same greedy tokens.

They run where the engines are installed (optimum-onnx[onnxruntime], optimum-intel[openvino], vllm,
xllamacpp with $LLAMA_CPP, an unpacked source distribution that holds llama.cpp's converter).
"""

import importlib.util
import os
from pathlib import Path

import pytest

from lory_jax.conversion import runs
from lory_jax.run.directory import RunDirectory
from tests.conversion.test_families import save
from tools import engines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A Lory model of random weights, merged by a text; its heads are wide enough for vLLM."""
    directory = tmp_path_factory.mktemp("export")
    sizes = {"head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": engines.CONTEXT}
    save(directory / "hf", "Llama", sizes)
    runs.import_llama(directory / "hf", directory / "run", experts=2)
    runs.export_run(RunDirectory(directory / "run"), directory / "out", prompt="a boat")
    return directory / "out"


@pytest.mark.parametrize("name", engines.ENGINES)
def test_greedy_tokens_are_those_of_transformers(export, name):
    engine, packages = engines.ENGINES[name]
    if not importlib.util.find_spec(packages[0]):
        pytest.skip(f"{packages[0]} is not installed")
    source = Path(os.environ["LLAMA_CPP"]) if "LLAMA_CPP" in os.environ else None
    if name == "llama.cpp" and source is None:
        pytest.skip("$LLAMA_CPP does not name llama.cpp's source, which has the converter")
    prompts = engines.encode(export)
    assert engine(export, prompts, source) == engines.by_transformers(export, prompts)


def test_tokens_in_common_end_at_the_first_difference():
    assert engines.common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert engines.common([1, 2], [1, 2, 4]) == 2
