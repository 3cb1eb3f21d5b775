import random

import numpy as np
import torch

from raydetr.training.random_state import get_random_state, seed_everything, set_random_state

CPU = torch.device("cpu")


def numbers():
    return random.random(), np.random.random(), torch.rand(3).tolist(), random.gauss(0, 1)


def test_generators_continue_where_they_were(tmp_path):
    seed_everything(1, 2)
    random.gauss(0, 1)  # keeps a second number for the next call
    numbers()
    torch.save(get_random_state(CPU), tmp_path / "state.pth")
    expected = numbers()
    seed_everything(3)
    assert numbers() != expected
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True), CPU)
    assert numbers() == expected


def test_seeds_follow_from_all_numbers():
    drawn = []
    for seed in ((7, 0, 1), (7, 1, 1), (7, 0, 2), (7, 0, 1)):
        seed_everything(*seed)
        drawn.append(numbers())
    assert drawn[0] == drawn[3]
    assert len({str(each) for each in drawn}) == 3
