# %% [markdown]
# # Training without batches
#
# A pipeline of one layer a worker that never drains: every gradient comes late. The simulator shows each stage the
# weights it would have had. A small residual network, 600 digits, batch size one. About a minute.

# %%
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + F.relu(self.linear(self.norm(x)))


def network(blocks: int = 10, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 10)
    )


stages = [["1"], *([str(number)] for number in range(2, 13))]
print(rc.pipeline.delays(len(stages)))

# %% [markdown]
# The rate of batches of 128 is scaled to one sample. `none` is plain pipelining; the delays of `SGDM` are zero.

# %%
train = rc.data.load("digits", "train", limit=600)
test = rc.data.load("digits", "test").batches(298)
lr, momentum = rc.pipeline.scale_hyperparameters(0.4, 0.9, reference_batch=128, batch=1)
delays = rc.pipeline.delays(len(stages))
for name, late in {"SGDM": [0] * len(stages), "none": delays, "sc": delays, "lwpv": delays, "lwpv+sc": delays}.items():
    model = network()
    mitigation = "none" if name == "SGDM" else name
    simulator = rc.pipeline.Simulator(model, stages, late, lr, momentum, 1e-4, mitigation)
    losses = [simulator.step(x, y) for x, y in train.batches(1)]
    print(f"{name:8} loss of the last 200 {sum(losses[-200:]) / 200:.3f}, test {rc.evaluate(model, test).top1:.2f}")

# %% [markdown]
# One short epoch and one seed: it shows the mechanism. What was measured at convergence, with intervals, is on the page
# about Pipelined Backpropagation.
