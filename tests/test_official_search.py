"""The published search from pictures to sentences: own Swin, own captioner, official style, against the recorded beams."""
import json
from pathlib import Path

import numpy as np
import torch
from drawn import drawn_file

from expnet.data.captions import Vocab
from expnet.decode.search import Beam, decode
from expnet.models.official import import_official
from expnet.models.swin import Swin, SwinConfig

GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
arrays = np.load(GOLDEN / "reference_a.npz")
PREFIX = "swin_transf."


@torch.no_grad()
def test_beams_from_pictures(tmp_path):
    c = recorded["config"]["swin"]
    weights = drawn_file(recorded, recorded["e2e_names"])
    backbone = Swin(SwinConfig(c["img"], c["embed"], tuple(c["depths"]), tuple(c["heads"]), c["window"], c["patch"])).eval()
    backbone.load_state_dict({name.removeprefix(PREFIX): x for name, x in weights.items() if name.startswith(PREFIX)})
    torch.save({"model_state_dict": {name: x for name, x in weights.items() if not name.startswith(PREFIX)}}, tmp_path / "drawn.pth")
    model, _ = import_official(tmp_path / "drawn.pth", Vocab(recorded["words"]), tuple(recorded["config"]["num_exp_enc_list"]), recorded["config"]["num_heads"])
    memory = model.encode(backbone(torch.from_numpy(arrays["images"]).float()))
    assert (memory.x - torch.from_numpy(arrays["e2e_memory"])).abs().max() < 1e-4
    keys = [key for key in recorded["beams"] if key.startswith("e2e")]
    assert keys
    for key in keys:
        size, limit = (int("".join(filter(str.isdigit, part))) for part in key.removeprefix("e2e_").split("_"))
        wanted = recorded["beams"][key]
        hyps = decode(model, memory, Beam(size, n_best=len(wanted["ids"][0]), style="official"), max_len=limit)
        for image, rows in enumerate(wanted["ids"]):
            for n, ids in enumerate(rows):
                assert hyps.tokens[image, n, :len(ids) - 1].tolist() == ids[1:], (key, image, n)
                assert np.abs(hyps.logp[image, n, :len(ids) - 1].numpy() - wanted["logp"][image][n][1:]).max() < 1e-4
