"""Drop-ins for torch's batch norms: same constructor, same state_dict, range batch normalization inside."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import _verify_batch_size  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import number
from recoup.kernels.operators import named
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.layout import flattened
from recoup.lightnorm.ops import Joined, infer, train
from recoup.lightnorm.passes import HALF
from recoup.lightnorm.reach import Reached
from recoup.lightnorm.separate import quantized_moments
from recoup.network.checks import float64_alike, is_module, strided
from recoup.network.derived import derived, only_adds
from recoup.network.emulated import Emulated


class LightNormLayer(Reached, Emulated, _NormBase):
    """What the layers share. They are no `nn.BatchNorm2d` and the like, so that converters of batch norms, such as
    `nn.SyncBatchNorm.convert_sync_batchnorm`, leave them as they are (`recoup.network.norms` knows them). Folding one
    into a float convolution (`torch.nn.utils.fusion.fuse_conv_bn_eval`) cannot be noticed: what it gives is a float
    convolution that does without the unit.

    Running statistics are torch's: ``running_mean`` follows mu, ``running_var`` follows (s - eps)^2, by ``momentum``
    (None: the cumulative mean), and eval divides by sqrt(running_var + eps), so that batch norm checkpoints load both
    ways. float16 and bfloat16 inputs are computed in float32 and given back in their dtype. A batch of none gives an
    empty result and leaves the running statistics as they are.

    Attributes:
        group: a process group whose joined batch is normalized in training (`synchronize_`), or None.
        by_moments: whether training mode takes mean and variance of the rounded input instead of the range's estimate:
            what paired recalibration compares, because a converted network's statistics are moments.
        saturated: channels whose mean or reciprocal left `LightNorm.statistics` in training so far; it warns once.
    """

    tells_baseline = True

    extras: ClassVar[tuple[str, ...]] = (*Emulated.extras, "group", "by_moments", "saturated")

    config: LightNorm
    group: Any
    by_moments: bool
    saturated: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        config: LightNorm | None = None,
    ) -> None:
        options = {"device": device, "dtype": dtype, **({} if bias else {"bias": False})}  # older torch has no bias
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.convert(LightNorm() if config is None else config, "")

    def convert(self, config: Any, layer: str) -> None:
        """Take a config; parameters and buffers stay."""
        if not isinstance(config, LightNorm):
            raise RecoupError(f"{type(self).__name__}(config={config!r}): config must be a LightNorm")
        super().convert(config, layer)
        for field, value in (("eps", self.eps), ("momentum", self.momentum)):
            if field == "eps" or value is not None:
                number(f"{self.title}: {self.float_class.__name__}", field, value, (0.0, 1.0))
        self.group, self.by_moments, self.saturated = None, False, 0

    def extra_repr(self) -> str:
        """The batch norm's fields and the config."""
        return f"{super().extra_repr()}, {self.config!r}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the batch norm's name
        """Normalize [N, C, ...]."""
        if self.mode != "emulate":
            return _BatchNorm.forward(self, input)  # type: ignore[arg-type]
        strided(input, self.title, "the input")
        self._check_input_dim(input)
        if self.weight is not None and input.is_floating_point():
            float64_alike(input, self.weight.dtype, self.title, "batch norm")
        if input.dtype in HALF:
            return self._normalized(input.float()).to(input.dtype)
        return self._normalized(input)

    def _normalized(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        gamma, beta = self._parameters_for(x)
        self.count_inputs(x)
        if not (self.training or self.running_mean is None):
            assert self.running_var is not None
            return infer(x, gamma, beta, self.running_mean, self.running_var, self.config.code, self.eps, self.title)[0]
        _verify_batch_size(x.shape)
        if x.numel() == 0 and self.group is None:
            return self._empty(x, gamma, beta)
        if self.training and self.by_moments:
            return self._normalized_by_moments(x, gamma, beta)
        if self.group is None:
            y, _, mean, s, _, _ = train(x, gamma, beta, self.config.code, self.eps, self.title)
        else:
            y, mean, s = Joined.apply(x, gamma, beta, self.config, self.eps, self.group, self.title)
        if self.training and self.track_running_stats:
            self._track(mean, s)
        if not (torch.compiler.is_compiling() or mean.is_meta or isinstance(mean, FakeTensor)):
            self._count(mean, s)
        return y

    def _empty(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """A batch of none, which torch counts and does not measure."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean = x.new_zeros(x.shape[1])
        return infer(x, gamma, beta, mean, torch.ones_like(mean), self.config.code, self.eps, self.title)[0]

    def _normalized_by_moments(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with named(self.title, x):
            mean, var = quantized_moments(flattened(x, self.config), self.config)
        y = infer(x, gamma, beta, mean, var, self.config.code, self.eps, self.title)[0]
        n = x.numel() // x.shape[1]
        self._track(mean, (var * (n / (n - 1))).sqrt() + self.eps)
        return y

    def _check_channels(self, x: Tensor) -> None:
        fixed = self.weight is not None or self.running_mean is not None
        if fixed and x.shape[1] != self.num_features:
            raise RecoupError(f"{self.title}: the input {list(x.shape)} has {x.shape[1]} channels")

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype not in (torch.float32, torch.float64):
            raise RecoupError(f"{self.title}: LightNorm takes floating point; got {x.dtype} {list(x.shape)}")
        if self.weight is None:
            return x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
        shift = x.new_zeros(x.shape[1]) if self.bias is None else self.bias.to(x.dtype)
        return self.weight.to(x.dtype), shift

    @torch.no_grad()
    def _track(self, mean: Tensor, s: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        factor: Any = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:  # as torch, which without it leaves a cumulative mean where it is
            self.num_batches_tracked.add_(1)
            factor = 1.0 / self.num_batches_tracked.double() if self.momentum is None else factor
        for buffer, new in ((self.running_mean, mean), (self.running_var, (s - self.eps).square())):
            buffer.copy_((1 - factor) * buffer.double() + factor * new)

    def _count(self, mean: Tensor, s: Tensor) -> None:
        form = self.config.statistics
        if form is None:
            return
        beyond = int(((mean.abs() >= form.largest_value) | (1 / s > form.largest_value)).sum())
        if beyond and not self.saturated:
            warnings.warn(
                f"{self.title}: the mean or 1/s of {beyond} channels left the statistics' format (largest value "
                f"{form.largest_value:g}) and was saturated; a channel of constants has 1/s = 1/eps. Counted on in "
                "layer.saturated",
                RecoupWarning,
                stacklevel=4,
            )
        self.saturated += beyond


class LightNorm1d(LightNormLayer):
    """`nn.BatchNorm1d` on a LightNorm unit: inputs [N, C] or [N, C, L].

    >>> LightNorm1d(8, config=LightNorm.range(chunks=1))(torch.randn(16, 8)).shape
    torch.Size([16, 8])
    """

    float_class = nn.BatchNorm1d
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class LightNorm2d(LightNormLayer):
    """`nn.BatchNorm2d` on a LightNorm unit: inputs [N, C, H, W]; blocks are neighbouring channels at one pixel, or
    neighbouring pixels of one channel."""

    float_class = nn.BatchNorm2d
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class LightNorm3d(LightNormLayer):
    """`nn.BatchNorm3d` on a LightNorm unit: inputs [N, C, D, H, W]."""

    float_class = nn.BatchNorm3d
    _check_input_dim = nn.BatchNorm3d._check_input_dim


class LightNormSync(LightNormLayer):
    """`nn.SyncBatchNorm` on a LightNorm unit, in one process: inputs [N, C, ...]."""

    float_class = nn.SyncBatchNorm
    _check_input_dim = nn.SyncBatchNorm._check_input_dim


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: LightNorm1d,
    nn.BatchNorm2d: LightNorm2d,
    nn.BatchNorm3d: LightNorm3d,
}


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The LightNorm class for a subclass of a batch norm without a forward of its own, and in one process for
    SyncBatchNorm, whose joined batch is LightNorm's own matter (`synchronize_`); None for anything else."""
    import torch.distributed as dist

    if kind is nn.SyncBatchNorm:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return None if several else LightNormSync
    for plain, emulated in LAYERS.items():
        if issubclass(kind, plain) and only_adds(kind, plain):
            return derived(emulated, kind, whole=False)
    return None


def synchronize_(model: nn.Module, group: Any = None) -> nn.Module:
    """Let every LightNorm layer normalize the joined batch of a process group: chunks are those of the processes'
    batches one after the other, in rank order, and the results those of one process that has them all, bit for bit.

    Args:
        model: with LightNorm layers.
        group: a process group; None: all processes.

    Raises:
        RecoupError: no LightNorm layer, or torch.distributed is not initialized. In training: chunks that are no
            multiple of the number of processes, or batches of different sizes.
    """
    import torch.distributed as dist

    from recoup.lightnorm.joined import EVERYONE

    is_module(model, "lightnorm.synchronize_")
    layers = [module for module in model.modules() if isinstance(module, LightNormLayer)]
    if not layers:
        raise RecoupError(
            "lightnorm.synchronize_: the model has no LightNorm layer: emulate_(model, LightNorm()) first"
        )
    if not dist.is_available() or not dist.is_initialized():
        raise RecoupError("lightnorm.synchronize_: torch.distributed is not initialized: init_process_group() first")
    for layer in layers:
        layer.group = EVERYONE if group is None else group
    return model
