"""Parts that fail in every way that a part may: run in other processes by test_gpu_check."""

import os
import time
from typing import Any


def mixed(device: Any) -> list[Any]:
    def falls_back() -> dict[str, bool]:
        from fusion_model.kernels.triton_launch import checked

        checked["rows", "cpu"] = False
        return {"ok": True}

    return [
        ("first", lambda: {"ok": True}),
        ("raises", lambda: 1 / 0),
        ("dies", lambda: os._exit(3)),
        ("between", lambda: {"ok": True}),
        ("hangs", lambda: time.sleep(1000)),
        ("wrong", lambda: {"ok": False}),
        ("falls back", falls_back),
        ("last but one", lambda: {"ok": True, "us": 3.0}),
        ("hangs, too", lambda: time.sleep(1000)),
    ]


def slow(device: Any) -> list[Any]:
    return [(str(n), lambda: time.sleep(0.2) or {"ok": True}) for n in range(1000)]


def unlistable(device: Any) -> list[Any]:
    raise RuntimeError("no such device")
