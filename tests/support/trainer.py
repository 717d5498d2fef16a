"""A stand-in for `train`: the first signal makes it save and end, whichever signal it is."""

import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def save(number: int, frame: FrameType | None) -> None:
    for handled in SIGNALS:  # a second one must not interrupt what the first one began
        signal.signal(handled, signal.SIG_IGN)
    print("saved", flush=True)
    sys.exit(128 + number)


for handled in SIGNALS:
    signal.signal(handled, save)
print("ready", flush=True)
time.sleep(600)
