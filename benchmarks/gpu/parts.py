"""What `fusion-lm gpu-check` runs: the kernels' own checks, whole models and times."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fusion_model.benchmarks.gpu import timing
from fusion_model.benchmarks.gpu.goals import of_auto, verdicts
from fusion_model.kernels.check.cases import Named, Result
from fusion_model.kernels.check.gpu import CHECKS, Part
from fusion_model.kernels.triton.configs import chip_of

_HERE = "fusion_model.benchmarks.gpu"
_TIMED = {
    "time tokens": f"{_HERE}.timing:tokens",
    "time sequences": f"{_HERE}.timing:sequences",
    "time prefixes": f"{_HERE}.timing:prefixes",
    "time surprisal": f"{_HERE}.timing:surprisals",
    "time models": f"{_HERE}.generate:times",
}
PARTS = {
    "generate": Part(f"{_HERE}.generate:cases"),
    **CHECKS,
    # Compiled here, beside each other, what is timed below.
    **{f"compile {n}": Part(f"{_HERE}.parts:compiled:{n}", 90) for n in _TIMED},
    **{name: Part(home, 30, timed=True) for name, home in _TIMED.items()},
}


def compiled(device: torch.device, name: str) -> list[Named]:
    """The eager cases of a timed part, each run once: Triton keeps on disk what it compiled."""

    def run_once(run: Callable[[], Any]) -> float:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1.0

    def without_figures(case: Callable[[], Result]) -> Result:
        timing.microseconds = run_once
        return {key: value for key, value in case().items() if key in ("ok", "us_error")}

    cases = Part(_TIMED[name]).cases(device)
    return [(n, partial(without_figures, case)) for n, case in cases if n.endswith("eager")]


def judge(results: dict[str, Any]) -> None:
    """What the project's goals, and `auto`, make of the rows that are known by now."""
    capability = chip_of(torch.device("cuda")).capability if torch.cuda.is_available() else 0
    results["measured"], auto = of_auto(results["parts"], capability)
    results["goals"] = verdicts(results["parts"]) + auto
