import math

import pytest
import torch

from raydetr.errors import UserError
from raydetr.model import position as positions
from raydetr.model.position import LearnedPosition, SinePosition, clear_position_cache


def sine_by_the_book(row: float, column: float, rows: float, columns: float, width: int) -> list[float]:
    """One place's encoding, number by number: ``row`` of ``rows`` counted from 1, the row's half first."""
    encoding = []
    for place, places in ((row, rows), (column, columns)):
        angle = place / (places + 1e-6) * 2 * math.pi
        for channel in range(width // 2):
            slowed = angle / 10000 ** (2 * (channel // 2) / (width // 2))
            encoding.append(math.sin(slowed) if channel % 2 == 0 else math.cos(slowed))
    return encoding


def test_sines_count_the_places_that_are_not_padded():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0] = False
    mask[1, :2, :3] = False
    position = SinePosition(16)(torch.zeros(2, 5, 3, 4), mask)
    assert position.shape == (2, 12, 16)
    for image, (rows, columns) in enumerate(((3, 4), (2, 3))):
        for row in range(rows):
            for column in range(columns):
                expected = torch.tensor(sine_by_the_book(row + 1, column + 1, rows, columns, 16))
                torch.testing.assert_close(position[image, 4 * row + column], expected, atol=1e-5, rtol=0)
    assert position.isfinite().all()


def test_without_a_mask_nothing_is_padded():
    features = torch.zeros(2, 5, 3, 4)
    position = SinePosition(16)
    torch.testing.assert_close(position(features, None).expand(2, -1, -1), position(features, torch.zeros(2, 3, 4, dtype=torch.bool)))


def test_what_inference_remembered_serves_training():
    features = torch.zeros(1, 5, 7, 11)
    with torch.inference_mode():
        SinePosition(16)(features, None)
    weight = torch.ones(16, requires_grad=True)
    (SinePosition(16)(features, None) * weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_few_encodings_are_kept_and_all_can_be_released():
    position = SinePosition(8)
    clear_position_cache()
    for height in range(1, 3 * positions.CACHED_SHAPES):
        position(torch.zeros(1, 5, height, 2), None)
    assert positions._unpadded_sines.cache_info().currsize == positions.CACHED_SHAPES
    again = torch.zeros(1, 5, height, 2)
    assert position(again, None) is position(again, None)
    clear_position_cache()
    assert positions._unpadded_sines.cache_info().currsize == 0


def test_learned_positions_put_the_column_first():
    learned = LearnedPosition(8)
    position = learned(torch.zeros(2, 5, 3, 4), None)
    assert position.shape == (1, 12, 8)
    place = position[0, 4 * 2 + 1]  # row 2, column 1
    torch.testing.assert_close(place, torch.cat((learned.col_embed.weight[1], learned.row_embed.weight[2])))
    position.sum().backward()
    assert learned.row_embed.weight.grad[:3].eq(4).all()
    assert learned.row_embed.weight.grad[3:].eq(0).all()


def test_learned_positions_start_uniform():
    weight = LearnedPosition(256).row_embed.weight
    assert weight.shape == (50, 128)
    assert 0 <= weight.min() < 0.01
    assert 0.99 < weight.max() <= 1


def test_learned_positions_end_at_fifty():
    learned = LearnedPosition(8)
    assert learned(torch.zeros(1, 1, 50, 50), None).shape == (1, 2500, 8)
    with pytest.raises(UserError, match=r"position_embedding: learned positions end at 50 x 50, the feature map is 2 x 51"):
        learned(torch.zeros(1, 1, 2, 51), None)
