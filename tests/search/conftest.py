import pytest

from raydetr.config import load_config
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search
from tests.search.searches import SPACE


@pytest.fixture
def make(tmp_path):
    def make(space=SPACE, name="search", config=None, **kwargs) -> Search:
        return create_search(tmp_path / name, read_space(space), config or load_config(), **{"trials": 8, **kwargs})

    return make
