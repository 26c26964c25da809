"""8-bit storage formats: bytes, errors, and independence of the parallel layout."""

import pytest
import torch

from megatron_mopd.teachers.encoding import BLOCK, Encoding
from megatron_mopd.teachers.layout import ALIGNMENT, Place, Segment, round_up

INT8_STEP = 0.5 / 127  # relative to a block's largest magnitude
FP8_STEP = 1 / 16  # relative to the number itself: three mantissa bits


def segment_of(**tensors):
    places, offset = [], 0
    for name, tensor in tensors.items():
        places.append(Place(name.replace("__", "."), tensor.dtype, tuple(tensor.shape), offset))
        offset = round_up(offset + places[-1].num_bytes, ALIGNMENT)
    segment = Segment("dense", tuple(places), offset)
    buffer = torch.zeros(offset, dtype=torch.uint8)
    for place, tensor in zip(places, tensors.values()):
        place.view(buffer).copy_(tensor)
    return segment, buffer


def there_and_back(dtype, **tensors):
    segment, buffer = segment_of(**tensors)
    encoding = Encoding(segment, dtype, 1)
    payload = torch.zeros(encoding.num_bytes, dtype=torch.uint8)
    encoding.encode(buffer, payload)
    back = torch.zeros_like(buffer)
    encoding.decode(payload, back)
    return [place.view(back) for place in segment.places], encoding


@pytest.mark.parametrize("columns", [1, 100, BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_errors_are_those_of_the_format(dtype, weights, columns):
    matrix = torch.randn(37, columns, generator=torch.Generator().manual_seed(columns)).to(weights)
    matrix[3] = 0
    (back,), _ = there_and_back(dtype, matrix=matrix)
    blocks = zip(matrix.double().split(BLOCK, 1), back.double().split(BLOCK, 1))
    for block, found in blocks:
        largest = block.abs().amax(1, keepdim=True)
        rounding = 2**-8 if weights is torch.bfloat16 else 1e-6
        if dtype == "int8":
            bound = largest * (INT8_STEP + rounding)
        else:
            bound = block.abs() * (FP8_STEP + rounding) + largest * 2**-9 / 448
        assert ((found - block).abs() <= bound).all()
    assert (back[3] == 0).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_vectors_and_routers_rest_as_they_are(dtype):
    tensors = dict(
        norm=torch.randn(64), bias=torch.randn(3).double(), layers__0__mlp__router__weight=torch.randn(4, 64)
    )
    back, _ = there_and_back(dtype, **tensors, matrix=torch.randn(64, 64))
    for found, tensor in zip(back, tensors.values()):
        assert torch.equal(found, tensor)


def test_bytes_of_a_matrix():
    _, encoding = there_and_back("int8", matrix=torch.randn(64, 1024, dtype=torch.bfloat16))
    assert encoding.num_bytes == 64 * 1024 + 64 * 1024 // BLOCK * 4  # a little more than half of bfloat16


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_shard_is_quantised_as_the_whole_is(dtype, dim):
    matrix = torch.randn(16, 4 * BLOCK)
    (whole,), _ = there_and_back(dtype, matrix=matrix)
    shards = [there_and_back(dtype, matrix=shard.contiguous())[0][0] for shard in matrix.chunk(2, dim)]
    assert torch.equal(torch.cat(shards, dim), whole)
