"""Fuzzes one reader in a process of its own, guided by coverage (atheris, which is libFuzzer).

    python -m tests.support.fuzz_worker READER SECONDS DIRECTORY

It ends with status 0 after so many seconds, and otherwise at the first input by which the reader
raises anything but the project's own error, needs 1 GB, hangs for 60 s, writes anything, or opens
a file outside of DIRECTORY. libFuzzer prints how many inputs there were and the most memory used.
"""

import random
import resource
import sys
from pathlib import Path

import atheris

LARGEST_MEMORY = 1000  # MB

with atheris.instrument_imports(include=["lory_jax"]):
    from tests.support import fuzz_readers
    from tests.support.fuzz_inputs import mutated
    from tests.support.open_files import reads_only_inside


def main() -> None:
    name, seconds, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
    target = getattr(fuzz_readers, name)(directory)
    corpus = directory.with_name(f"{name}-corpus")
    corpus.mkdir(exist_ok=True)
    (corpus / "seed").write_bytes(target.seed)
    target.file.write_bytes(target.seed)
    fuzz_readers.read(target)  # imports what it needs, which opens files of the installation
    limit_address_space()

    def try_one(data: bytes) -> None:
        target.file.write_bytes(data)
        with reads_only_inside(directory):
            fuzz_readers.read(target)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, largest)
        return mutated(data, rng)[:largest]

    flags = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={LARGEST_MEMORY}",
        "-timeout=60",
        "-max_len=200000",
        "-len_control=0",
        "-print_final_stats=1",
        f"-artifact_prefix={directory.parent}/",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], try_one, custom_mutator=mutate)
    atheris.Fuzz()


def limit_address_space() -> None:
    """An allocation that would take the process beyond the limit raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LARGEST_MEMORY * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
