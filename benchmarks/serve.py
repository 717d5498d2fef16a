"""Whether a server leaks: thousands of requests, and its memory, threads and files meanwhile.

    python benchmarks/serve.py --workdir=RUN_DIR [--requests=5000] [--clients=50] [--json=FILE]

Starts `lory serve` as a process of its own and sends requests of mixed lengths from many clients at
a time: streamed and whole, some refused, and every tenth abandoned by a client that goes away. It
reads /proc/PID of the server after every tenth of the requests, when nothing is running (Linux
only).
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WARM_UP = 0.2  # share of the requests before memory counts: programs are compiled on first use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    command = [sys.executable, "-m", "lory_jax.serve", f"--workdir={args.workdir}", "--port=0"]
    server = subprocess.Popen([*command, "--domains=none"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        assert found, f"the server did not start: {line}"
        result = load(server.pid, int(found[1]), args.requests, args.clients)
        server.send_signal(signal.SIGTERM)
        result["exit_status"] = server.wait(60)
    finally:
        server.kill()
    print(table(result))
    if args.json:
        temporary = args.json.with_name(args.json.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.json)


def load(pid: int, port: int, requests: int, clients: int) -> dict[str, Any]:
    """Sends all requests; returns counts by outcome, and what the server held after each tenth."""
    outcomes: dict[str, int] = {}
    samples = [sample(pid, 0)]
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for tenth in range(10):
            numbers = range(tenth * requests // 10, (tenth + 1) * requests // 10)
            for outcome in pool.map(lambda number: send(port, number), numbers):
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            wait_until_idle(port)
            samples.append(sample(pid, numbers.stop))
            print(samples[-1], file=sys.stderr, flush=True)
    return {
        "requests": requests,
        "clients": clients,
        "seconds": time.monotonic() - start,
        "outcomes": dict(sorted(outcomes.items())),
        "samples": samples,
    }


def send(port: int, number: int) -> str:
    """One request; what became of it."""
    rng = random.Random(number)
    body = {
        "model": "lory" if number % 50 else "nobody",
        "prompt": "def read(self" * rng.randrange(4),
        "max_tokens": rng.randrange(1, 24),
        "stream": number % 2 == 0,
        "seed": number,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if number % 10 == 3:
            time.sleep(rng.random() * 0.05)
            return "abandoned"
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    finally:
        connection.close()


def wait_until_idle(port: int) -> None:
    """Until nothing waits and nothing is being continued."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        if re.search(r"^lory_waiting_texts 0.0$", text, re.M) and re.search(
            r"^lory_active_texts 0.0$", text, re.M
        ):
            time.sleep(0.5)  # connections that were closed are taken off
            return
        time.sleep(0.05)


def sample(pid: int, done: int) -> dict[str, int]:
    """Memory in KiB, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.M))
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {
        "requests": done,
        "rss_kib": int(fields["VmRSS"]),
        "threads": int(fields["Threads"]),
        "files": files,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'requests':>9}{'RSS, MiB':>10}{'threads':>9}{'files':>7}"]
    for row in result["samples"]:
        rss = row["rss_kib"] / 1024
        lines.append(f"{row['requests']:9,}{rss:10,.1f}{row['threads']:9}{row['files']:7}")
    first = int(WARM_UP * 10)
    grown = result["samples"][-1]["rss_kib"] / result["samples"][first]["rss_kib"] - 1
    lines.append(f"memory from {WARM_UP:.0%} of the requests on: {grown:+.1%}")
    lines.append(f"outcomes: {result['outcomes']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
