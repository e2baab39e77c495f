"""Pipelined backpropagation written out: all versions of all weights in lists, functional calls, formulas by hand.

Nothing is shared with the simulator: stages are cut modules, the backward pass multiplies stage by stage with weights
chosen per stage, and the update follows the specification's text.
"""

import torch


def train(stages, delays, samples, rates, momentum, decay, method, loss):
    """Train a list of stage modules; the versions of every stage's parameters, a list of dicts."""
    S = len(stages)
    versions = [[{n: p.detach().clone() for n, p in stage.named_parameters()}] for stage in stages]
    velocity = [{n: torch.zeros_like(p) for n, p in v[0].items()} for v in versions]
    seen = [[dict(v[0])] for v in versions]  # what a forward at version k uses
    losses = []
    for k, (x, y) in enumerate(samples):
        outputs, inputs = [], []
        for s, stage in enumerate(stages):
            row = max(0, k - delays[s])
            inputs.append((outputs[-1] if outputs else x).detach().requires_grad_())
            outputs.append(torch.func.functional_call(stage, seen[s][row], (inputs[-1],)))
        last = outputs[-1].detach().requires_grad_()
        value = loss(last, y)
        losses.append(value.item())
        (flow,) = torch.autograd.grad(value, last)
        for s in reversed(range(S)):
            if method == "stash":
                weights = seen[s][max(0, k - delays[s])]
            elif method == "spectrain":
                weights = {n: w - rates[k] * s * velocity[s][n] for n, w in versions[s][k].items()}
            else:
                weights = versions[s][k]
            flow, gradients = backward(stages[s], inputs[s].detach(), seen[s][max(0, k - delays[s])], weights, flow)
            update(s, k, gradients, versions, velocity, delays[s], rates[k], momentum, decay, method)
        for s in range(S):
            seen[s].append(predicted(s, k + 1, versions, velocity, delays[s], rates[k + 1], method))
    return [v[-1] for v in versions], losses


def backward(stage, x, forward_weights, backward_weights, flow):
    """Gradients of an affine stage with tanh: activations of the forward, multiplication by the newest weights."""
    w, b = forward_weights["0.weight"], forward_weights["0.bias"]
    y = torch.nn.functional.linear(x, w, b)
    if len(stage) > 1:
        z = torch.tanh(y)
        flow = flow * (1 - z * z)
    gradients = {"0.weight": flow.t() @ x, "0.bias": flow.sum(0)}
    return flow @ backward_weights["0.weight"], gradients


def update(s, k, gradients, versions, velocity, delay, rate, momentum, decay, method):
    """One update of a stage: SGD with momentum, or Spike Compensation."""
    new = {}
    for name, w in versions[s][k].items():
        g = gradients[name] + decay * w
        v = momentum * velocity[s][name] + g
        velocity[s][name] = v
        if method.endswith("sc"):
            a = momentum**delay
            new[name] = w - rate * (a * v + (1 - a) / (1 - momentum) * g)
        else:
            new[name] = w - rate * v
    versions[s].append(new)


def predicted(s, k, versions, velocity, delay, rate, method):
    """The weights a forward at version k uses."""
    now, before = versions[s][k], versions[s][k - 1]
    if method.startswith("lwpv"):
        return {n: w - rate * delay * velocity[s][n] for n, w in now.items()}
    if method.startswith("lwpw"):
        return {n: w + delay * (w - before[n]) for n, w in now.items()}
    if method == "spectrain":
        return {n: w - rate * (delay + s) * velocity[s][n] for n, w in now.items()}
    return dict(now)
