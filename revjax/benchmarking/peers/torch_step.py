"""`python torch_step.py CONFIG`: one peer's part, in an environment with torch and without revjax; prints JSON.

Every peer gets the same modules F (attention) and G (MLP) of each layer, and two streams that begin as the same x.
"""

import importlib.metadata
import json
import sys

import torch
from process import measure
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        width = -(-8 * d_model // 3 // 32) * 32
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.wide = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def forward(self, x):
        gate, value = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.out(silu(gate) * value)


class Stored(nn.Module):
    """x1 += F(x2); x2 += G(x1), differentiated as PyTorch does."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers)

    def forward(self, x):
        x1 = x2 = x
        for f, g in self.layers:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return (x1 + x2) / 2


class Residual(nn.Module):
    """The ordinary network under torch.utils.checkpoint: x += F(x); x += G(x), of which x is kept for each layer."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers)
        self.recompute = True

    def forward(self, x):
        def layer(f, g, x):
            x = x + f(x)
            return x + g(x)

        for f, g in self.layers:
            x = checkpoint(layer, f, g, x, use_reentrant=False) if self.recompute else layer(f, g, x)
        return x


class TwoStreams(nn.Module):
    """A peer's sequence, whose streams are the halves of one array's channels."""

    def __init__(self, sequence):
        super().__init__()
        self.sequence = sequence

    def forward(self, x):
        y1, y2 = self.sequence(torch.cat([x, x], dim=-1)).chunk(2, dim=-1)
        return (y1 + y2) / 2


def build(peer, layers):
    if peer == "stored":
        return Stored(layers)
    if peer == "checkpoint":
        return Residual(layers)
    if peer == "reformer-pytorch":
        from reformer_pytorch.reversible import ReversibleSequence

        return TwoStreams(ReversibleSequence(nn.ModuleList(nn.ModuleList(layer) for layer in layers)))
    if peer == "revtorch":
        import revtorch

        blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=-1) for f, g in layers]
        return TwoStreams(revtorch.ReversibleSequence(nn.ModuleList(blocks)))
    if peer == "revlib":
        import revlib

        return TwoStreams(revlib.ReversibleSequential(*(f for layer in layers for f in layer), split_dim=-1))
    if peer == "memcnn":
        import memcnn

        couple = lambda f, g: memcnn.AdditiveCoupling(Fm=f, Gm=g, split_dim=-1)
        wrap = lambda fn: memcnn.InvertibleModuleWrapper(fn=fn, keep_input=False, keep_input_inverse=False)
        return TwoStreams(nn.Sequential(*(wrap(couple(f, g)) for f, g in layers)))
    raise ValueError(peer)


def main(given):
    torch.manual_seed(0)
    layers = [(Attention(given["d_model"]), MLP(given["d_model"])) for _ in range(given["num_layers"])]
    model = build(given["peer"], layers)
    parameters = [p for layer in layers for f in layer for p in f.parameters()]
    # As the output of an embedding would: some peers need it.
    x = torch.randn(given["batch_size"], given["sequence_length"], given["d_model"], requires_grad=True)

    def gradient(model):
        (model(x) ** 2).mean().backward()
        found = [p.grad for p in parameters]
        for p in (x, *parameters):
            p.grad = None
        return found

    found = measure(lambda: gradient(model), given["what"], given["repeats"])
    ours = gradient(model)
    if given["peer"] == "checkpoint":
        model.recompute = False
    stored = gradient(model if given["peer"] == "checkpoint" else Stored(layers))
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(ours, stored))
    error = (difference / sum(float((b**2).sum()) for b in stored)) ** 0.5
    package = "torch" if given["peer"] in ("stored", "checkpoint") else given["peer"]
    return {given["what"]: found, "version": importlib.metadata.version(package), "error": error}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
