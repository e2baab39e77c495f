# %% [markdown]
# # How many accumulator bits does my network need?
#
# A small network on handwritten digits, on accumulators of 14 bits and below: what is lost, which layer loses it, what
# a repair wins back. Under a minute.

# %%
from pathlib import Path

import recoup as rc
from recoup.cli.demo import train_weights

train_weights(Path("recoup-demo"))  # trains the demo's network, or finds it
model = rc.models.load("digits_net", "recoup-demo/digits_net.safetensors").eval()
images = rc.data.load("digits", "train", limit=256).batches(128)
test = rc.data.load("digits", "test").batches(298)
print(f"float {rc.evaluate(model, test).top1:.2f}")

# %% [markdown]
# M mantissa and four exponent bits, with the sign: M + 5 bits. The default repair is a gain a channel and paired
# recalibration of the batch norms; no training.

# %%
rows = []
for mantissa in (9, 7, 5, 4, 3):
    rc.emulate_(model, rc.LBA.biased(mantissa, 4))
    before = rc.evaluate(model, test).top1
    rc.repair_(model, images)
    rows.append((mantissa + 5, before, rc.evaluate(model, test).top1))
    rc.restore_(model)
    print("{} bits: {:.2f}, repaired {:.2f}".format(*rows[-1]))

# %% [markdown]
# Which layer? `slope` below 1 says that sums shrink, which a gain undoes; `residual` is what no gain can undo.

# %%
rc.emulate_(model, rc.LBA.biased(3, 4))
for row in rc.lba.profile(model, images):
    print(
        f"{row.name:14} {row.terms:4} terms, swamped {row.swamped:.3f}, slope {row.slope:.3f}, residual {row.residual:.3f}"
    )
rc.restore_(model)

# %%
import matplotlib.pyplot as plt

bits, before, after = zip(*rows, strict=True)
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(bits, before, "o-", label="no repair")
axes.plot(bits, after, "s-", label="repaired")
axes.set(xlabel="accumulator bits", ylabel="top-1, %")
axes.legend()
figure.savefig("accumulator_bits.png")
