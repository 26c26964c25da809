"""The KV cache: what was stored comes back, row by row, whatever rows have left or multiplied."""

import torch

from megatron_mopd.model.kv_cache import KeyValueCache


def test_rows_multiply_and_leave():
    """Two appended steps, rows reordered in between, against plain concatenation; views, not copies."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(5, 3, 2, width, generator=generator) for width in (4, 6)]  # key and value differ
    cache = KeyValueCache(3, 8)
    keys, values = cache.append(1, *first)
    assert torch.equal(keys, first[0]) and torch.equal(values, first[1])
    cache.sequence_len_offset += 5
    rows = torch.tensor([2, 0, 2, 2])
    cache.keep_rows(rows)
    new = [torch.randn(1, 4, 2, width, generator=generator) for width in (4, 6)]
    keys, values = cache.append(1, *new)
    for found, old, added in ((keys, first[0], new[0]), (values, first[1], new[1])):
        assert torch.equal(found, torch.cat((old[:, rows], added)))
    assert keys.untyped_storage().data_ptr() == cache.append(1, *new)[0].untyped_storage().data_ptr()
