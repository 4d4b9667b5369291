"""ExpansionNet v2 computed the way the published code computes it (same results): what our speed is compared with."""
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expnet.models.captioner import Memory
from expnet.models.dropout import Dropout
from expnet.models.dynamic_expansion import DynamicExpansion
from expnet.models.expansionnet import CrossAttention, ExpansionNet
from expnet.models.linear import Linear
from expnet.models.static_expansion import StaticExpansion


def normalise(x: Tensor) -> Tensor: return x / (x.sum(-1, keepdim=True) + 1e-9)


def parts(module, x: Tensor) -> list[Tensor]:
    "One linear layer after the other, instead of all as one."
    weights, biases = module.weight.chunk(module.parts), module.bias.chunk(module.parts)
    return [F.linear(x, w, b) for w, b in zip(weights, biases)]


def gathered(table: Tensor, batch: int) -> Tensor:
    "The whole table once for each picture, copied through an embedding look-up."
    return F.embedding(torch.arange(len(table)).expand(batch, -1), table)


class PublishedDropout(Dropout):
    def forward(self, x: Tensor) -> Tensor: return F.dropout(x, self.p, self.training)


class PublishedStatic(StaticExpansion):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        key, a, b, selector = parts(self.project, x)
        query, bias = gathered(self.query, len(x)), gathered(self.bias, len(x))
        z = self.dropout(query @ key.transpose(1, 2) / sqrt(x.shape[-1]))
        hidden = (mask == 0)[:, None].expand_as(z)
        filled = [self.dropout(normalise(F.relu(s).masked_fill(hidden, 0)) @ v + bias) for s, v in ((z, a), (-z, b))]
        out = []
        for s, f in zip((z, -z), filled):
            back = torch.cat([normalise(part) for part in F.relu(s.transpose(1, 2)).split(self.groups, -1)], -1)
            out.append(self.dropout(back @ f / len(self.groups)))
        gate = torch.sigmoid(selector)
        return gate * out[0] + (1 - gate) * out[1]


class PublishedDynamic(DynamicExpansion):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, length, dim = x.shape
        cond, key, a, b, selector = parts(self.project, x)
        query = (gathered(self.query, batch)[:, None] + cond[:, :, None]).flatten(1, 2)       # (batch, vectors, dim)
        bias = (gathered(self.bias, batch)[:, None] + cond[:, :, None]).flatten(1, 2)
        z = self.dropout(query @ key.transpose(1, 2) / sqrt(dim))
        forward = (keep == 0).repeat_interleave(len(self.query), 1)
        backward = (keep == 0).repeat_interleave(len(self.query), 2)
        out = []
        for s, v in ((z, a), (-z, b)):
            filled = self.dropout(normalise(F.relu(s).masked_fill(forward, 0)) @ v) + bias
            out.append(self.dropout(normalise(F.relu(s.transpose(1, 2)).masked_fill(backward, 0)) @ filled))
        gate = torch.sigmoid(selector)
        return gate * out[0] + (1 - gate) * out[1]


class PublishedCross(CrossAttention):
    def remember(self, x: Tensor) -> Tensor: return x

    def forward(self, y: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = (t.repeat_interleave(len(y) // len(t), 0) for t in (x, mask))
        query, key, value = self.split(self.query(y)), self.split(self.key(x)), self.split(self.value(x))
        scores = (query @ key.transpose(-1, -2) / sqrt(key.shape[-1])).masked_fill((mask == 0)[:, None, None], -1e4)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def as_published(model: ExpansionNet) -> ExpansionNet:
    "`model` itself, its blocks replaced by those above; the weights stay."
    kinds = {StaticExpansion: PublishedStatic, DynamicExpansion: PublishedDynamic, CrossAttention: PublishedCross, Dropout: PublishedDropout,
             Linear: nn.Linear}
    for module in model.modules(): module.__class__ = kinds.get(type(module), type(module))
    return model


def dense_loss(logits: Tensor, targets: Tensor, pad: int, smoothing: float = 0.1) -> Tensor:
    "The smoothed loss through a table of targets as large as the logits."
    logp = logits.log_softmax(-1)
    goal = torch.full_like(logp, smoothing / (logp.shape[-1] - 1)).scatter_(-1, targets[..., None], 1 - smoothing)
    goal = goal.masked_fill((targets == pad)[..., None], 0)
    return F.kl_div(logp, goal, reduction="sum") / (targets != pad).sum()


def sample_with_gradient(model: ExpansionNet, memory: Memory, n: int, max_len: int) -> tuple[Tensor, Tensor]:
    "Samples [B·n, L] and their log-probabilities: all words so far through the whole decoder, for every word; no early end."
    tokens = torch.full((len(memory.x) * n, 1), model.vocab.sos)
    chosen = []
    for _ in range(max_len):
        logp = model(memory, tokens).log_softmax(-1)[:, -1]
        word = torch.multinomial(logp.detach().exp(), 1)
        tokens = torch.cat([tokens, word], 1)
        chosen.append(logp.gather(1, word))
    return tokens[:, 1:], torch.cat(chosen, 1)
