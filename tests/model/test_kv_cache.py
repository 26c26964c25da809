"""The KV cache returns what was stored for each row, also after rows were removed or duplicated."""

import pytest
import torch

from megatron_mopd.model.kv_cache import KeyValueCache


@pytest.mark.parametrize("shared", [0, 2])
def test_rows_multiply_and_leave(shared):
    """Packed prompts, then reordered rows with one more token each, against plain slices; the cache returns
    views, not copies. With shared tokens, every prompt begins with the first tokens of the packed row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 5, 1])
    first = [torch.randn(8 + shared, 1, 2, width, generator=generator) for width in (4, 6)]  # key, value
    cache = KeyValueCache(lengths + shared, 8 + shared, shared)
    keys, values = cache.append(1, *first)
    assert torch.equal(keys, first[0]) and torch.equal(values, first[1])
    cache.sequence_len_offset += cache.longest_prompt
    rows = torch.tensor([2, 0, 2, 2])
    cache.keep_rows(rows)
    new = [torch.randn(1, 4, 2, width, generator=generator) for width in (4, 6)]
    keys, values = cache.append(1, *new)
    for found, packed, added in ((keys, first[0], new[0]), (values, first[1], new[1])):
        end = 5 + shared
        assert len(found) == end + 1 and torch.equal(found[end:], added)
        begin, *rest = packed.squeeze(1).split([shared, *lengths.tolist()])
        prompts = [torch.cat((begin, own)) for own in rest]
        for column, row in enumerate(rows.tolist()):
            assert torch.equal(found[end - len(prompts[row]) : end, column], prompts[row])
    assert keys.untyped_storage().data_ptr() == cache.append(1, *new)[0].untyped_storage().data_ptr()
