"""The asynchronous pipeline as hardware runs it: stage objects, mailboxes and ticks; delays are not given, they result.

Nothing is overwritten under a graph: the backward pass takes the vector-Jacobian product of one primitive layer at a
time, at the input that the forward stored and with weights chosen explicitly.
"""

import torch
from torch.func import functional_call


class Stage:
    """One worker: primitive layers, all their weights' history, and the samples under way."""

    def __init__(self, layers, position, count, momentum, decay, how):
        self.layers, self.position, self.delay = layers, position, 2 * (count - 1 - position)
        self.momentum, self.decay, self.how = momentum, decay, how
        self.weights = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in layers]
        self.before = [dict(w) for w in self.weights]
        self.velocity = [{n: torch.zeros_like(p) for n, p in w.items()} for w in self.weights]
        self.stored, self.updates = {}, 0

    def horizon_forward(self):
        return {"velocity": self.delay, "spectrain": self.delay + self.position}.get(self.how.prediction, 0)

    def by_velocity(self, horizon, rate):
        return [
            {n: v[n] * (self.how.horizon * horizon) * -rate + w[n] for n in w}
            for w, v in zip(self.weights, self.velocity, strict=True)
        ]

    def ahead(self, rate):
        if self.how.prediction == "weight":
            T = self.how.horizon * self.delay
            return [{n: (w[n] - b[n]) * T + w[n] for n in w} for w, b in zip(self.weights, self.before, strict=True)]
        return (
            self.by_velocity(self.horizon_forward(), rate)
            if self.horizon_forward()
            else [dict(w) for w in self.weights]
        )

    def forward(self, k, x, rate):
        used, inputs = self.ahead(rate), []
        for layer, weights in zip(self.layers, used, strict=True):
            inputs.append(x)
            x = functional_call(layer, weights, (x,)).detach()
        self.stored[k] = inputs, used
        return x

    def backward(self, k, flow, rate):
        inputs, forward_weights = self.stored.pop(k)
        weights = forward_weights if self.how.stash else self.weights
        if self.how.prediction == "spectrain":
            weights = self.by_velocity(self.position, rate)
        gradients = []
        for index in reversed(range(len(self.layers))):
            first = self.position == 0 and index == 0
            x = inputs[index].detach().requires_grad_(not first)
            own = {n: w.detach().requires_grad_() for n, w in weights[index].items()}
            wanted = [*([] if first else [x]), *own.values()]
            with torch.enable_grad():
                y = functional_call(self.layers[index], own, (x,))
            found = list(torch.autograd.grad(y, wanted, flow)) if wanted else []
            flow = None if first else found.pop(0)
            gradients.insert(0, dict(zip(own, found, strict=True)))
        self.update(gradients, rate)
        return flow

    def update(self, gradients, rate):
        m, a = self.momentum, self.momentum ** (self.how.compensation * self.delay)
        b = (1 - a) / (1 - m)
        self.before = [dict(w) for w in self.weights]
        for w, v, gradient in zip(self.weights, self.velocity, gradients, strict=True):
            for n in w:
                g = torch.add(gradient[n] * self.how.shrink**self.delay, w[n], alpha=self.decay)
                v[n] = v[n] * m + g
                change = v[n] * a + g * b if self.how.compensation else v[n]
                if self.how.annealing and self.delay:
                    change = change / self.delay ** (1 - min(self.updates / self.how.annealing, 1))
                w[n] = torch.add(w[n], change, alpha=-rate)
        self.updates += 1


def train(stages, samples, rates, momentum, decay, how, loss):
    """Run a list of lists of primitive layers until all samples are through; (losses, weights by stage and layer)."""
    S, N = len(stages), len(samples)
    workers = [Stage(layers, s, S, momentum, decay, how) for s, layers in enumerate(stages)]
    activations, flows, losses = {}, {}, []
    for t in range(N + 2 * (S - 1)):
        sent_activations, sent_flows = {}, {}
        for s, worker in enumerate(workers):  # all at once: what is sent in a tick arrives in the next
            k, j = t - s, t - 2 * (S - 1) + s
            if 0 <= k < N:
                rate = rates(worker.updates)
                y = worker.forward(k, samples[k][0] if s == 0 else activations.pop((s, k)), rate)
                if s < S - 1:
                    sent_activations[s + 1, k] = y
                else:
                    y = y.requires_grad_()
                    with torch.enable_grad():
                        value = loss(y, samples[k][1])
                    losses.append(value.item())
                    flows[s, k] = torch.autograd.grad(value, y)[0]
            if 0 <= j < N:
                flow = worker.backward(j, flows.pop((s, j)), rates(worker.updates))
                if s:
                    sent_flows[s - 1, j] = flow
        activations |= sent_activations
        flows |= sent_flows
    return losses, [worker.weights for worker in workers]
