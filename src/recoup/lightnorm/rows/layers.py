"""Drop-ins for torch's layer norm and RMS norm: same constructor, same state_dict, ranges inside."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import number
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.passes import HALF
from recoup.lightnorm.rows.ops import check_features, normalize
from recoup.lightnorm.rows.reference import Kind
from recoup.network.checks import strided
from recoup.network.derived import derived, only_adds
from recoup.network.emulated import Emulated
from recoup.network.row_norms import features_of, like_rms_norm


class LightRows(Emulated):
    """What the layers share: an input [..., *normalized_shape], whose trailing axes are flattened to D features.

    There are no running statistics: training and evaluation are the same. float16 and bfloat16 are computed in float32
    and given back in their dtype. Float32 in formats runs in kernels of our own on the CPU; float64, no format, a
    format of x - mu and CUDA run in torch's operations on float64, with the same bits.

    Attributes:
        gain: float32 [D], a repair (`recoup.lightnorm.correct_gain_`) that multiplies gamma xhat before y is first
            rounded, or None. It is a constant: gradients pass through it, and it never goes into gamma.
    """

    kind: ClassVar[Kind]
    extras: ClassVar[tuple[str, ...]] = (*Emulated.extras, "gain")
    travelling: ClassVar[tuple[str, ...]] = ("gain",)
    fitted: ClassVar[tuple[str, ...]] = ("gain",)

    config: LightNorm
    gain: Tensor | None
    weight: Tensor | None  # type: ignore[assignment]

    def convert(self, config: Any, layer: str) -> None:
        """Take a config; parameters stay."""
        if not isinstance(config, LightNorm):
            raise RecoupError(f"{type(self).__name__}(config={config!r}): config must be a LightNorm")
        if self.epsilon is not None or self.kind == "layer":
            number(type(self).__name__, "eps", self.epsilon, (0.0, 1.0))
        super().convert(config, layer)
        if self.kind == "rms" and config.scale != "gaussian":
            raise RecoupError(
                f"{self.title}: an RMS norm's scale comes from largest magnitudes, for which LightNorm(scale="
                f"{config.scale!r}) has no constant: use scale='gaussian', or leave it in float with a layer map's None"
            )
        check_features(self.features, config, self.title)
        self.register_buffer("gain", None, persistent=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes that are normalized, the last ones of an input."""
        return tuple(self.normalized_shape)  # type: ignore[arg-type]

    @property
    def features(self) -> int:
        """D."""
        return features_of(self)

    @property
    def epsilon(self) -> float | None:
        """What is added to s; None: ``torch.finfo(dtype).eps`` of what is computed in."""
        return self.eps  # type: ignore[return-value]

    @property
    def shift(self) -> Tensor | None:
        """beta, where there is one."""
        return getattr(self, "bias", None)

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Normalize every sample of the one argument, which the float classes call input, x or hidden_states."""
        if self.mode != "emulate":
            return super().forward(*args, **named)  # type: ignore[misc]
        if len(args) + len(named) != 1:
            raise RecoupError(f"{self.title}: it takes the input alone; got {len(args) + len(named)} arguments")
        input = strided((*args, *named.values())[0], self.title, "the input")  # noqa: A001 -- torch's name
        x = input.float() if input.dtype in HALF else input
        gamma, beta = self._vectors_for(x)
        eps = torch.finfo(x.dtype).eps if self.epsilon is None else self.epsilon
        y = normalize(x, gamma, beta, self.gain, self.kind, self.config.code, eps, self.title)[0]
        return y.to(input.dtype)

    def _vectors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, flat, in x's dtype."""
        if x.dtype not in (torch.float32, torch.float64):
            raise RecoupError(f"{self.title}: LightNorm takes floating point; got {x.dtype} {list(x.shape)}")
        if tuple(x.shape[max(x.dim() - len(self.shape), 0) :]) != self.shape:
            raise RecoupError(f"{self.title}: the input {list(x.shape)} must end with {list(self.shape)}")
        vectors = []
        for value, fill in ((self.weight, 1.0), (self.shift, 0.0)):
            if value is not None and value.dtype != x.dtype and not (value.dtype in HALF or x.dtype == torch.float32):
                raise RecoupError(f"{self.title}: the input is {x.dtype}, the parameters are {value.dtype}")
            vectors.append(x.new_full((self.features,), fill) if value is None else value.to(x.dtype).flatten())
        return vectors[0], vectors[1]

    def extra_repr(self) -> str:
        """The float layer's fields, the config, and whether there is a gain."""
        config = self.__dict__.get("config")
        text = super().extra_repr()
        return text if config is None else f"{text}, {config!r}" + (", gain" if self.gain is not None else "")

    def fault(self, name: str, value: Any) -> str | None:
        """As `Emulated`: a gain is finite, one number a feature."""
        if name == "gain" and tuple(value.shape) != (self.features,):
            return f"has shape {list(value.shape)}"
        return "holds NaN or infinity" if name == "gain" and not bool(value.isfinite().all()) else None


class LightLayerNorm(LightRows, nn.LayerNorm):
    """`nn.LayerNorm` on a LightNorm unit: mean and range of a sample's D features, in K chunks in memory order.

        mu = S(sum x_q / D),   s = (1/K) sum_k C(m_k) (max_k - min_k) + eps,   r = S(1/s),   x_q = B(F(x))
        xhat = F(D(x_q - mu) r),   y = B(F(F(gamma) xhat + F(beta)))

    What a format rounds is exact before; blocks lie along the features (`LightNorm.axis` is batch norm's). Gradients:
    `recoup.lightnorm.rows.reference.backward`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: of `nn.LayerNorm`.
        config: a `LightNorm`; None: the default one.

    Raises:
        RecoupError: fewer features than two a chunk; eps outside 0..1; no LightNorm. In forward: another shape or
            dtype; with ``nonfinite="error"``, NaN or infinities.

    Source: ours, after Noh et al., "LightNorm", ICCD 2022.

    >>> LightLayerNorm(16, config=LightNorm.fp10())(torch.zeros(2, 16)).shape
    torch.Size([2, 16])
    """

    float_class = nn.LayerNorm
    kind = "layer"

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        config: LightNorm | None = None,
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.convert(LightNorm() if config is None else config, "")


class LightRMSNorm(LightRows, nn.RMSNorm):
    """`nn.RMSNorm` on a LightNorm unit: the root of the mean square from the largest magnitudes of K chunks.

        s = (1/K) sum_k A(m_k) max_k |x_q| + eps,   A(m) = 1 / E[max of m |N(0, 1)|],   r = S(1/s),   x_q = B(F(x))
        xhat = F(x_q r),   y = B(F(F(gamma) xhat))

    As `LightLayerNorm` otherwise; the config's ``scale`` must be ``gaussian``.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: of `nn.RMSNorm`; eps None is
            ``torch.finfo(dtype).eps``.
        config: a `LightNorm`; None: the default one.

    Raises:
        RecoupError: as `LightLayerNorm`; another scale.

    Source: ours, after Noh et al., "LightNorm", ICCD 2022.

    >>> LightRMSNorm(16, config=LightNorm.fp10())(torch.zeros(2, 16)).shape
    torch.Size([2, 16])
    """

    float_class = nn.RMSNorm
    kind = "rms"

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        config: LightNorm | None = None,
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self.convert(LightNorm() if config is None else config, "")


class LightLikeRMSNorm(LightRows):
    """A class of another package that computes what `nn.RMSNorm` does (`recoup.network.row_norms`), on a LightNorm
    unit."""

    kind = "rms"

    def convert(self, config: Any, layer: str) -> None:
        """Take a config; such a class normalizes the last axis alone."""
        if self.weight is None or self.weight.dim() != 1:
            given = None if self.weight is None else list(self.weight.shape)
            raise RecoupError(
                f"layer '{layer}' ({self.float_class.__name__}): its weight {given} is no vector, and it normalizes "
                f'the last axis: leave it in float with layers={{"{layer}": None}}'
            )
        super().convert(config, layer)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)  # type: ignore[union-attr]

    @property
    def epsilon(self) -> float | None:
        return self.variance_epsilon  # type: ignore[return-value]


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LightLayerNorm, nn.RMSNorm: LightRMSNorm}
"""The norms over features that LightNorm stands in for."""


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for a subclass of torch's norms without a forward of its own, and for classes that are RMS norms by
    their code; None for anything else."""
    for plain, emulated in LAYERS.items():
        if issubclass(kind, plain):
            return derived(emulated, kind) if only_adds(kind, plain) else None
    return derived(LightLikeRMSNorm, kind) if like_rms_norm(kind) else None
