"""A captioner without weights for tests of searches, in which every beginning of every picture has its own random next-word table; captions of no meaning."""
import torch

from expnet.data.vocabulary import Vocab
from expnet.models.captioner import Captioner, Memory, Step

WORDS = ["EOS", "PAD", "SOS", "UNK", "a", "disc", "red", "the", "on", "top"]


class Toy(Captioner):
    """log-probabilities [R, K, V] that depend on the picture and on all words so far, by a hash; `sharp` 0 makes them uniform."""

    def __init__(self, words: int = 8, K: int = 1, sharp: float = 2.0, max_len: int = 10, seed: int = 0, dtype=torch.float32):
        super().__init__(Vocab(WORDS[:words]), max_len)
        self.K, self.sharp, self.dtype = K, sharp, dtype
        self.table = torch.randn(997, K, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def encode(self, x, mask=None):
        return Memory(x, torch.ones(x.shape[:2], dtype=torch.bool))

    def start(self, memory):
        return {"hash": memory.x[:, 0, 0].long() * 131 + 7, "said": memory.x.new_zeros(len(memory.x), 0, dtype=torch.long)}

    def step(self, memory, state, previous, look=False):
        code = state["hash"]
        for word in previous.unbind(1): code = (code * 31 + word + 1) % 997
        said = torch.cat([state["said"], previous], 1)
        logp = (self.sharp * self.table[code]).log_softmax(-1).to(self.dtype)
        aux = {"code": code[:, None].repeat(1, self.K).double(), "said": said[:, None].repeat(1, self.K, 1).double()} if look else {}
        return Step(logp, {"hash": code, "said": said}, aux)


class Cheap:
    """A reward that costs nothing: the mean of the token ids, in ten thousands."""
    signature = "cheap"
    def __call__(self, ids, tokens): return tokens.double().mean(-1).cpu().numpy() / 10_000


def pictures(n: int, first: int = 0) -> torch.Tensor:
    """n different pictures [n, 1, 1]; the toy only looks at their number."""
    return torch.arange(first, first + n).float()[:, None, None]


def captions(vocab: Vocab, rows: int, longest: int) -> torch.Tensor:
    """Rows [rows, longest] of SOS, 1 to longest - 2 words, EOS, PAD, always the same; the first one is the longest."""
    torch.manual_seed(2)
    length, place = torch.randint(1, longest - 1, (rows, 1)), torch.arange(longest)
    length[0] = longest - 2
    words = torch.where(place == 0, vocab.sos, torch.randint(4, len(vocab), (rows, longest)))
    return torch.where(place == length + 1, vocab.eos, torch.where(place > length + 1, vocab.pad, words))
