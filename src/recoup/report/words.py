"""What the report explains: terms, and where the model ends."""

INTERVALS = {
    "t": "Student's t over the seeds: how much the choice of calibration images matters",
    "wilson": "Wilson's score over the test images: how much the choice of test images matters",
}

TERMS = {
    "thread": "One of the 2 or 4 parts of a layer's reduction (its input channels) that share a multiplier.",
    "slot": "One multiplier in one cycle; every thread brings it one activation and one weight.",
    "active": "A thread whose activation and weight in a slot are both non-zero.",
    "collision": (
        "A slot with two or more active threads: the multiplier is split, and an operand may lose its 4 low bits. "
        "The rate is over all slots."
    ),
    "lossy": (
        "A thread's product that came out changed; the rate is over the active products. Operands that fit 4 bits "
        "pass a collision unchanged."
    ),
    "utilization": "Slots with an active thread, over all slots.",
    "error": (
        "Squared difference of a layer's output from the 8-bit output for the same input, over the square of the "
        "8-bit output, both summed over all images."
    ),
    "mean part": (
        "The share of the error that is one constant per output channel: what bias correction removes and BatchNorm "
        "recalibration absorbs."
    ),
    "8 bit": (
        "The baseline: unsigned 8-bit activations (one scale a layer), signed 8-bit weights (one scale an output "
        "channel), exact sums, one thread."
    ),
    "policy": (
        "Which slack is looked for before an operand is reduced: S zero operands, A and W activations or weights that "
        "fit 4 bits; the capital letter of Aw and aW names the operand that is reduced when neither fits."
    ),
    "gain": "Points of accuracy over the same hardware's float statistics, seed by seed.",
    "slowed": "Of the emulated layers: those that run fewer threads, by the layer map or because they are grouped.",
    "won back": (
        "Gain over loss, where the loss is what the hardware costs against its baseline (NB-SMT: 8 bit; others: "
        "float); shown for losses of more than 0.1 points and more than one test image."
    ),
}

UNIT_TERMS = {
    "underflowed": "Products that fell below the product format's smallest number, of all that were not zero.",
    "swamped": "Products that reached the accumulator and left its sum as it was, of all that were not zero by then.",
    "overflowed": "Sums that reached the accumulator's largest number, of all sums.",
    "slope": "Least-squares factor from the exact sums to the accumulator's; truncation makes it less than 1.",
    "residual": "What the slope leaves: root mean square, relative to the exact sums'. A gain cannot remove it.",
}

TRAFFIC_TERMS = {
    "batch norm traffic": (
        "Bits that batch norms read from and write to memory in a training step, counted from shapes, a pass over a "
        "feature map at its stored width: a model, our own count. Conventional: 7 reads and 2 writes in float32; "
        "range: 5 reads and 2 writes."
    ),
    "range": "The standard deviation is estimated from ranges in the pass that sums: a read less forward and backward.",
    "format": "Activations and gradients are stored in a narrow floating point format.",
    "blocks": (
        "Neighbouring channels share an exponent. Where a lone largest element keeps its own, a block stores two "
        "exponents and an index."
    ),
}

MODELLED = (
    "Every product and sum of the emulated layers, bit for bit: zero detection, collisions, 4-bit reduction and its "
    "rounding, exact 32-bit accumulation.",
    "8-bit quantisation of activations and weights, with scales from the calibration images.",
    "Narrow accumulators: every product and every sum, truncated from its exact value, in the hardware's order.",
    "Range batch norm, with the network's running statistics: every rounding of inputs, parameters and results, and "
    "shared exponents. Its traffic is counted from shapes.",
    "Cycles of an output-stationary systolic array: tiling, skew, drain and threads; tiles overlap.",
)
NOT_MODELLED = (
    "Layers outside the emulation, by default the first and the last: their accuracy is that of float, their cycles "
    "are those of 8-bit arithmetic with one thread.",
    "Activation functions, residual additions, and normalisation without a LightNorm unit: float, as torch computes "
    "them.",
    "Memory beyond that count: cycles assume that operands arrive in time.",
    "Area, energy and clock frequency.",
)
