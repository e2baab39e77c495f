# %% [markdown]
# # A chip in a few minutes
#
# Which layer on what, so that the network takes the fewest cycles and keeps its accuracy: score every layer alone,
# solve a knapsack a budget, measure every point of the front, keep the chip in one file. About a minute.

# %%
from pathlib import Path

import recoup as rc
from recoup.cli.demo import train_weights

train_weights(Path("recoup-demo"))  # trains the demo's network, or finds it
model = rc.models.load("digits_net", "recoup-demo/digits_net.safetensors").eval()
images = rc.data.load("digits", "train", limit=256).batches(128)
test = rc.data.load("digits", "test").batches(298)
rc.calibrate_(model, images)

# %%
cheapest = rc.NBSMT(threads=4, policy="A", rounding="zero")
space = rc.search.Space(
    {
        r"re:features\.(3|7|10)": [rc.NBSMT(threads=1), rc.NBSMT(threads=2), cheapest],
        "classifier": [None, rc.LBA.m7e4()],
    }
)
scores = rc.search.score(model, images, space, out="chip-search")
front = rc.search.verify(rc.search.front(scores, "cycles", points=4), model, test, seeds=1, out="chip-search")
for point in front.front:
    print(
        f"{point.costs['cycles']:,.0f} cycles, damage {point.measured.damage:.5f}, top-1 {point.measured.reached:.2f}"
    )

# %% [markdown]
# Take the cheapest that loses at most half a point, put the network on it, repair, and keep both.

# %%
chosen = front.within(0.5).policy
rc.emulate_(model, chosen)
rc.repair_(model, images)
print(rc.evaluate(model, test))
rc.save(model, "chip.safetensors")
print(rc.describe(rc.load("chip.safetensors", rc.models.digits_net())))

# %% [markdown]
# What the hardware of one layer costs in gates, beside conventional hardware, is `rc.silicon.build(config)`: see the
# guide about silicon.
