"""A part that fails in every way that one may, and a worker process of its own for it.

As a script it does what `gpu_check.work_off` does, without PyTorch, so that it starts at once.
"""

import json
import os
import sys
import time
from typing import Any


def mixed(device: Any) -> list[Any]:
    return [
        ("first", lambda: {"ok": True}),
        ("raises", lambda: 1 / 0),
        ("dies", lambda: os._exit(3)),
        ("between", lambda: {"ok": True}),
        ("hangs", lambda: time.sleep(1000)),
        ("wrong", lambda: {"ok": False}),
        ("last but one", lambda: {"ok": True, "us": 3.0}),
        ("hangs, too", lambda: time.sleep(1000)),
    ]


def lost(device: Any) -> list[Any]:
    """Of a device that does not come back: the second process cannot even list its cases."""
    if os.path.exists(os.environ["FAKE_MARK"]):
        raise RuntimeError("no device any more")
    open(os.environ["FAKE_MARK"], "w").close()
    return [("first", lambda: {"ok": True}), ("dies", lambda: os._exit(4)), ("more", None)]


def endless(device: Any) -> list[Any]:
    def short() -> dict[str, bool]:
        time.sleep(0.01)
        return {"ok": True}

    return [(str(n), short) for n in range(1000)]


def unlistable(device: Any) -> list[Any]:
    raise RuntimeError("no such device")


if __name__ == "__main__":
    home, skip, _ = sys.argv[1:]

    def tell(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    cases = globals()[home.split(":")[1]](None)
    tell(plan=[name for name, _ in cases])
    for name, run in cases[int(skip) :]:
        tell(begin=name)
        try:
            tell(result={"case": name} | run())
        except Exception as error:
            tell(result={"case": name, "ok": False, "error": type(error).__name__})
