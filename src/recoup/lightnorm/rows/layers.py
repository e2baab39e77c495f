"""Drop-ins for torch's layer norm and RMS norm: same constructor, same state_dict, ranges inside."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import number
from recoup.gains import Gained, Seen
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.passes import HALF
from recoup.lightnorm.reach import Reached
from recoup.lightnorm.rows.ops import check_features, normalize
from recoup.lightnorm.rows.passes import multiplier
from recoup.lightnorm.rows.reference import Kind
from recoup.network.checks import float64_alike, strided
from recoup.network.derived import derived, only_adds
from recoup.network.emulated import Mode
from recoup.network.row_norms import OutputDtype, features_of, output_dtype_of


class LightRows(Reached, Gained):
    """What the layers share: an input [..., *normalized_shape], whose trailing axes are flattened to D features.

    There are no running statistics: training and evaluation are the same. float16 and bfloat16 are computed in float32;
    the output's dtype is the float layer's. Float32 in formats runs in kernels of our own on the CPU; float64, no
    format, a format of x - mu and CUDA run in torch's operations on float64, with the same bits.

    Attributes:
        gain: float32 [D], a repair (`recoup.lightnorm.correct_gain_`) that multiplies gamma xhat before y is first
            rounded, or None. It is a constant: gradients pass through it, and it never goes into gamma.
    """

    kind: ClassVar[Kind]
    exact_mode: ClassVar[Mode] = "float"
    rounds_gained: ClassVar[bool] = True
    gained_as: ClassVar[tuple[str, str]] = ("features", "gave only beta")
    eps_name: ClassVar[str] = "eps"

    config: LightNorm
    weight: Tensor | None  # type: ignore[assignment]

    def convert(self, config: Any, layer: str) -> None:
        """Take a config; parameters stay."""
        if not isinstance(config, LightNorm):
            raise RecoupError(f"{type(self).__name__}(config={config!r}): config must be a LightNorm")
        super().convert(config, layer)
        self.title = f"layer '{layer}' ({self._described()})"
        self._check_epsilon()
        if self.kind == "rms" and config.scale != "gaussian":
            raise RecoupError(
                f"{self.title}: an RMS norm's scale comes from largest magnitudes, for which LightNorm(scale="
                f"{config.scale!r}) has no constant: use scale='gaussian', or leave it in float with a layer map's None"
            )
        check_features(self.features, config, self.title)
        self.begin_without_gain()

    def _described(self) -> str:
        """Shape and options, for messages."""
        return self.float_class.extra_repr(self)

    def _check_epsilon(self) -> None:
        """A plain number, since eps is a constant of the unit."""
        if isinstance(self.epsilon, Tensor):
            raise RecoupError(
                f"{self.title}: its {self.eps_name} is a tensor {list(self.epsilon.shape)}, and the unit adds a plain "
                f"number from 0 to 1: set {self.eps_name} = float(...), or leave it in float with a layer map's None"
            )
        number(f"{self.title}: {self.float_class.__name__}", self.eps_name, self.epsilon, (0.0, 1.0))

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes that are normalized, the last ones of an input."""
        return tuple(self.normalized_shape)  # type: ignore[arg-type]

    @property
    def features(self) -> int:
        """D."""
        return features_of(self)

    @property
    def channels(self) -> int:
        """As many as a gain has numbers: D."""
        return self.features

    @property
    def epsilon(self) -> Any:
        """What is added to s; of an RMS norm None is ``torch.finfo(dtype).eps`` of what is computed in."""
        return self.eps

    @property
    def shift(self) -> Tensor | None:
        """beta, where there is one; an RMS norm has none, whatever parameters a class may have added."""
        return getattr(self, "bias", None) if self.kind == "layer" else None

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """What the float layer gives for an input: of torch's layers its dtype."""
        return x.dtype

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Normalize every sample of the one argument, which the float classes call input, x or hidden_states."""
        if self.mode != "emulate":
            return super().forward(*args, **named)  # type: ignore[misc]
        x = self._input(args, named)
        return self._normalized(x)[0].to(self.output_dtype(x))

    def seen(self, output: Tensor, args: tuple, kwargs: dict) -> Seen:
        """As `Gained`: a gain multiplies F(gamma) xhat, behind which it is that F(beta) is added and y rounded."""
        x = self._input(args, kwargs)
        vectors = self._vectors_for(x)
        p = multiplier(vectors[0], None, self.config) * self._normalized(x)[1].double()
        y, z = (v.detach().reshape(p.shape).double() for v in (output, self._exact(args, kwargs)))
        return Seen(p, z - (y - p), -1)

    def gained(self, gain: Tensor, seen: Seen, output: Tensor, args: tuple, kwargs: dict) -> Tensor:  # noqa: ARG002
        """As `Gained`: what it gives with the gain in its place."""
        self.gain = gain
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.gain = None

    def _input(self, args: tuple, named: dict) -> Tensor:
        if len(args) + len(named) != 1:
            raise RecoupError(f"{self.title}: it takes the input alone; got {len(args) + len(named)} arguments")
        return strided((*args, *named.values())[0], self.title, "the input")

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y like x and xhat [S, D], in the dtype that is computed in."""
        gamma, beta = self._vectors_for(x)
        self.count_inputs(x)
        eps = self.epsilon
        if eps is None:
            eps = torch.finfo(torch.float32 if x.dtype in HALF else x.dtype).eps
        code = self.config.code
        y, xhat, *_ = normalize(x.to(gamma.dtype), gamma, beta, self.gain, self.kind, code, eps, self.title)
        return y, xhat

    def _vectors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, flat, in the dtype that is computed in: float64 where anything is, else float32."""
        if x.dtype not in (*HALF, torch.float32, torch.float64):
            raise RecoupError(f"{self.title}: LightNorm takes floating point; got {x.dtype} {list(x.shape)}")
        if tuple(x.shape[max(x.dim() - len(self.shape), 0) :]) != self.shape:
            raise RecoupError(f"{self.title}: the input {list(x.shape)} must end with {list(self.shape)}")
        given = [value for value in (self.weight, self.shift) if value is not None]
        for value in given:
            self._check_dtypes(x, value.dtype)
        wide = torch.float64 in (x.dtype, *(value.dtype for value in given))
        dtype, vectors = torch.float64 if wide else torch.float32, []
        for value, fill in ((self.weight, 1.0), (self.shift, 0.0)):
            full = x.new_full((self.features,), fill, dtype=dtype)
            vectors.append(full if value is None else value.to(dtype).flatten())
        return vectors[0], vectors[1]

    def _check_dtypes(self, x: Tensor, parameters: torch.dtype) -> None:
        """Refuse dtypes that the float layer refuses; RMS norms take all."""

    def extra_repr(self) -> str:
        """The float layer's fields, the config, and whether there is a gain."""
        config = self.__dict__.get("config")
        text = super().extra_repr()
        return text if config is None else f"{text}, {config!r}" + (", gain" if self.gain is not None else "")


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
    bias: Tensor | None

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

    def _check_dtypes(self, x: Tensor, parameters: torch.dtype) -> None:
        float64_alike(x, parameters, self.title, "layer norm")


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
    eps: float | None

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

    def _check_epsilon(self) -> None:
        if self.eps is not None:
            super()._check_epsilon()


class LightLikeRMSNorm(LightRows):
    """A class of another package that computes what `nn.RMSNorm` does (`recoup.network.row_norms`), on a LightNorm
    unit.

    Attributes:
        ends_in: its own rule for the dtype of its output.
    """

    kind = "rms"
    extras: ClassVar[tuple[str, ...]] = (*LightRows.extras, "ends_in")
    eps_name: ClassVar[str] = "variance_epsilon"
    ends_in: OutputDtype

    def convert(self, config: Any, layer: str) -> None:
        """Take a config; such a class normalizes the last axis alone."""
        given = None if self.weight is None else list(self.weight.shape)
        if self.weight is None or self.weight.dim() != 1:
            raise RecoupError(
                f"layer '{layer}' ({self.float_class.__name__}): its weight {given} is no vector, and it normalizes "
                f'the last axis: leave it in float with layers={{"{layer}": None}}'
            )
        ends_in = output_dtype_of(self.float_class)
        assert ends_in is not None
        self.__dict__["ends_in"] = ends_in
        super().convert(config, layer)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)  # type: ignore[union-attr]

    @property
    def epsilon(self) -> Any:
        return getattr(self, self.eps_name, None)

    def _described(self) -> str:
        return f"{self.float_class.__name__} {list(self.shape)}"

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """As its class: promoted, the input's, or half as the weight is."""
        assert self.weight is not None
        return self.ends_in(self.weight.dtype, x.dtype)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LightLayerNorm, nn.RMSNorm: LightRMSNorm}
"""The norms over features that LightNorm stands in for."""


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for a subclass of torch's norms without a forward of its own, and for classes that are RMS norms by
    their code; None for anything else."""
    for plain, emulated in LAYERS.items():
        if issubclass(kind, plain):
            return derived(emulated, kind) if only_adds(kind, plain) else None
    return None if output_dtype_of(kind) is None else derived(LightLikeRMSNorm, kind)
