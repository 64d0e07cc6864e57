import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Small tensors: a second thread costs more than it gives, far more on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYDET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
