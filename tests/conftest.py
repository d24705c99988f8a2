"""For every test: those marked ``gpu`` are skipped, and say so, where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def precision_of_training() -> None:
    """TF32 on GPUs, as distributed.start sets it: the compiler warns of its absence, and a warning is an error."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
