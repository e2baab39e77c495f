# %% [markdown]
# # A norm in ten bits
#
# LightNorm: the deviation from ranges, values in FP10, neighbouring channels sharing an exponent. A trained network is
# converted, and a fresh one is trained with it. About a minute.

# %%
from pathlib import Path

import torch
import torch.nn.functional as F

import recoup as rc
from recoup.cli.demo import train_weights

train_weights(Path("recoup-demo"))  # trains the demo's network, or finds it
model = rc.models.load("digits_net", "recoup-demo/digits_net.safetensors").eval()
images = rc.data.load("digits", "train", limit=512).batches(128)
test = rc.data.load("digits", "test").batches(298)
norms = {"range": rc.LightNorm.range(), "+ FP10": rc.LightNorm.fp10(), "+ blocks of 4": rc.LightNorm()}

# %%
for name, config in norms.items():
    rc.emulate_(model, config)
    before = rc.evaluate(model, test).top1
    rc.recalibrate_(model, images)
    print(f"{name:14} converted {before:.2f}, recalibrated {rc.evaluate(model, test).top1:.2f}")
    rc.restore_(model)

# %% [markdown]
# Trained from scratch, two epochs: one seed says nothing about half a point.

# %%
for name, config in {"batch norm": None, **norms}.items():
    torch.manual_seed(0)
    fresh = rc.models.digits_net()
    if config is not None:
        rc.emulate_(fresh, config)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        for x, y in rc.data.load("digits", "train").batches(64, shuffle=True, seed=epoch, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(fresh.train()(x), y).backward()
            optimizer.step()
    print(f"{name:14} trained {rc.evaluate(fresh, test).top1:.2f}")

# %% [markdown]
# What it saves: memory traffic of the batch norms in a training step, a model that counts passes over feature maps.

# %%
traffic = rc.lightnorm.traffic(rc.emulate_(model, rc.LightNorm()), next(iter(images))[0])
for row in traffic.layers:
    print(f"{row.name:12} {row.conventional / 8e3:8.1f} kB in float32, {row.blocks / 8e3:8.1f} kB")
print(f"{traffic.ratio:.2f} times less")
