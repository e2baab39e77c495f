"""Which modules of a model form which stage of its pipeline.

A stage is a list of module names; a name covers its whole subtree.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.models.cifar import CifarResNet
from recoup.models.vgg import VGG

Stages = list[list[str]]
WEIGHTLESS = (nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.modules.batchnorm._BatchNorm)


def automatic(model: nn.Module) -> Stages:
    """The stages of a Sequential-like model, a ResNet for CIFAR or a VGG of `recoup.models`.

    A stage is a layer with the norm and the activation behind it; in a VGG convolution and activation are apart. Each
    residual sum, pooling and the loss is a stage of its own without parameters: an empty list, which only counts for
    the delays.

    Raises:
        RecoupError: another model: list the stages yourself.

    Source: one stage per layer group, as in the paper; its exact cut is not published, so the counts are ours.

    >>> automatic(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    [['0', '1'], ['2'], []]
    """
    if isinstance(model, nn.Sequential):
        return [*_sequence(model, ""), []]
    if isinstance(model, CifarResNet):
        return _cifar_resnet(model)
    if isinstance(model, VGG):
        return _vgg(model)
    raise RecoupError(
        f"pipeline.automatic: no rule for a {type(model).__name__}; give the stages as lists of module names, such as "
        f"{[[name] for name, _ in list(model.named_children())[:3]]}"
    )


def _sequence(model: nn.Sequential, prefix: str) -> Stages:
    """Every module starts a stage, but norms and what has no parameters join the one before."""
    stages: Stages = []
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.Sequential):
            stages += _sequence(module, f"{path}.")
        elif stages and (isinstance(module, NORMS) or not any(True for _ in module.parameters())):
            stages[-1].append(path)
        else:
            stages.append([path])
    return stages


def _cifar_resnet(model: CifarResNet) -> Stages:
    stages: Stages = [["conv1", "bn1"]]
    for group in ("layer1", "layer2", "layer3"):
        for index, block in enumerate(getattr(model, group)):
            path = f"{group}.{index}"
            shortcut = [f"{path}.shortcut"] if any(True for _ in block.shortcut.parameters()) else []
            stages += [[f"{path}.conv1", f"{path}.bn1"], [f"{path}.conv2", f"{path}.bn2", *shortcut], []]
    return [*stages, [], ["linear"], []]  # pooling, classifier, loss


def _vgg(model: nn.Module) -> Stages:
    stages: Stages = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            stages.append([name])
        elif isinstance(module, NORMS):
            stages[-1].append(name)
        elif isinstance(module, (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            stages.append([name])
    return [*stages, []]


def resolve(model: nn.Module, stages: Sequence[Iterable[str]]) -> list[list[str]]:
    """The names of the parameters of every stage, in the model's order.

    Raises:
        RecoupError: a stage that names no module, a module in two stages, a module with parameters in none, or a
            parameter that modules of two stages share; the message names them.
    """
    modules = dict(model.named_modules())
    owner: dict[str, int] = {}
    for index, names in enumerate(stages):
        if isinstance(names, str):
            raise RecoupError(f"pipeline: stage {index} is the string {names!r}; a stage is a list of module names")
        for name in names:
            if name not in modules:
                near = ", ".join(list(modules)[1:7])
                raise RecoupError(f"pipeline: stage {index} names {name!r}, which the model lacks; it has {near}, ...")
            for covered in modules:
                if covered == name or covered.startswith(f"{name}.") or name == "":
                    if covered in owner:
                        raise RecoupError(
                            f"pipeline: module {covered!r} is in stage {owner[covered]} and in stage {index}; a name "
                            "covers its whole subtree"
                        )
                    owner[covered] = index
    found: list[list[str]] = [[] for _ in stages]
    seen: dict[int, tuple[str, int]] = {}
    missed: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        if module not in owner:
            missed.append(module or name)
            continue
        stage = owner[module]
        if id(parameter) in seen:
            other, before = seen[id(parameter)]
            if before != stage:
                raise RecoupError(
                    f"pipeline: {other!r} (stage {before}) and {name!r} (stage {stage}) are one parameter; stages "
                    "cannot share parameters: put both in one stage or untie them"
                )
            continue
        seen[id(parameter)] = name, stage
        found[stage].append(name)
    if missed:
        shown = ", ".join(dict.fromkeys(missed))
        raise RecoupError(f"pipeline: no stage holds {shown}: every module with parameters must be in one")
    if any(parameter.dtype != torch.promote_types(parameter.dtype, torch.float32) for parameter in model.parameters()):
        raise RecoupError("pipeline: parameters must be float32 or float64")
    return found
