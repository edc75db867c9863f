import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Every test starts from the same seed and leaves the number of threads as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_reproducible):
    """For problems so small that two threads are slower."""
    torch.set_num_threads(1)


@pytest.fixture
def both_thread_counts():
    """Calls a function with 1 and with 2 threads and returns both results."""

    def run(function):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(function())
        return results

    return run
