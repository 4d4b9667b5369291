"""Weights in the published layout, drawn from their names, as the description of the recorded reference says."""
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def drawn(name: str, shape: Sequence[int], seed: int, eos: int) -> torch.Tensor:
    """The weight called `name` (without a buffer's); `eos` is the row of EOS in the vocabulary."""
    x = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if len(shape) > 1:
        table = any(part in name for part in ("exp_vectors", "embed.weight", "pos_encoder"))
        x = x / 2 if table else x / np.sqrt(shape[-1])
        if name == "vocab_linear.weight": x = x * 3
    else:
        x = 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
        if name == "vocab_linear.bias": x[eos] += 3.5
    return torch.from_numpy(x.astype(np.float32))


def drawn_file(recorded: Mapping, names: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """All tensors of `names` (name -> shape) that are drawn, for the `recorded` seed and words."""
    eos = recorded["words"].index("EOS")
    return {name: drawn(name, shape, recorded["seed"], eos) for name, shape in names.items()
            if not name.endswith(("attn_mask", "relative_position_index"))}
