"""The KV cache: what was stored comes back, row by row, whatever rows have left or multiplied."""

import torch

from megatron_mopd.model.kv_cache import KeyValueCache


def test_rows_multiply_and_leave():
    """Packed prompts and one token a row, rows reordered in between, against plain slices; views, not
    copies."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 5, 1])
    first = [torch.randn(8, 1, 2, width, generator=generator) for width in (4, 6)]  # key and value differ
    cache = KeyValueCache(lengths, 8)
    keys, values = cache.append(1, *first)
    assert torch.equal(keys, first[0]) and torch.equal(values, first[1])
    cache.sequence_len_offset += cache.longest_prompt
    rows = torch.tensor([2, 0, 2, 2])
    cache.keep_rows(rows)
    new = [torch.randn(1, 4, 2, width, generator=generator) for width in (4, 6)]
    keys, values = cache.append(1, *new)
    for found, packed, added in ((keys, first[0], new[0]), (values, first[1], new[1])):
        assert len(found) == 6 and torch.equal(found[5:], added)
        prompts = packed.squeeze(1).split(lengths.tolist())
        for column, row in enumerate(rows.tolist()):
            assert torch.equal(found[5 - len(prompts[row]) : 5, column], prompts[row])
    assert keys.untyped_storage().data_ptr() == cache.append(1, *new)[0].untyped_storage().data_ptr()
