"""Compiles MaxText's training step and writes its program; runs in MaxText's own environment.

    MAXTEXT_PYTHON tools/beside_maxtext_worker.py OUT.txt FIELD=VALUE ...

The program is that of `maxtext.trainers.pre_train.train_compile`, with the fields of its base.yml
set as given. Prints one JSON object: bytes per device and versions.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(out: str, *fields: str) -> None:
    import maxtext
    from jaxlib._hlo import HloPrintOptions
    from maxtext.trainers.pre_train import train_compile

    found: list[Any] = []
    compile_step = train_compile.jit_and_compile

    def compile_and_keep(*arguments: Any) -> Any:
        found.append(compile_step(*arguments))
        return found[0]

    train_compile.jit_and_compile = compile_and_keep
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), *fields])
    (compiled,) = found
    options = HloPrintOptions()
    options.print_large_constants = True
    (module,) = compiled.runtime_executable().hlo_modules()
    Path(out).write_text(module.to_string(options))
    memory = compiled.memory_analysis()
    result = {
        "bytes_per_device": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "versions": {name: version(name) for name in ("maxtext", "jax", "libtpu", "flax")},
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
