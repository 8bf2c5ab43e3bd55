"""Shared by the suites: threads as the user set them, and what machine this was."""

from typing import Any

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
