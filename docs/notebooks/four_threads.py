# %% [markdown]
# # Four threads on one multiplier, and the repair
#
# NB-SMT without zero detection and with truncation, the cheapest of the multipliers, on handwritten digits: three
# states of the batch norms' statistics, never two. Under a minute.

# %%
from pathlib import Path

import recoup as rc
from recoup.cli.demo import train_weights

train_weights(Path("recoup-demo"))  # trains the demo's network, or finds it
model = rc.models.load("digits_net", "recoup-demo/digits_net.safetensors").eval()
images = rc.data.load("digits", "train", limit=512).batches(128)
test = rc.data.load("digits", "test").batches(298)
config = rc.NBSMT(threads=4, policy="A", rounding="zero")

# %%
rc.calibrate_(model, images)
rc.emulate_(model, rc.NBSMT(threads=1))
print(f"8 bit                    {rc.evaluate(model, test).top1:.2f}")
rc.restore_(model)
rc.calibrate_(model, images)
rc.emulate_(model, config)
print(f"4 threads                {rc.evaluate(model, test).top1:.2f}")

# %% [markdown]
# Where does it hurt? `lossy`: products that came out changed; `mean_shift`: the share of the error that is a constant a
# channel, which is what recalibration absorbs.

# %%
for row in rc.nbsmt.profile(model, images):
    print(
        f"{row.name:12} lossy {row.lossy:.2f}, error {row.error:.4f}, of that constant {row.mean_shift / row.error:.2f}"
    )

# %% [markdown]
# Paired recalibration moves the stored statistics by the difference between hardware off and on; averaging replaces
# them by those of these images.

# %%
for method in ("paired", "average"):
    rc.recalibrate_(model, images, method=method)
    print(f"4 threads, {method:13} {rc.evaluate(model, test).top1:.2f}")
    rc.undo_(model, "statistics")
rc.correct_bias_(model)
print(f"4 threads, bias          {rc.evaluate(model, test).top1:.2f}")
print(rc.describe(model))
