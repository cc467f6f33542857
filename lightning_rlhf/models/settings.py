"""Settings of a model: plain dataclasses that a recipe's YAML spells out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Layout = Literal["shared_prefix", "padded"]
Checkpointing = bool | Literal["selective"]

LORA_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "eva")

Settings = TypeVar("Settings")


def from_plain(cls: type[Settings], value: Settings | Mapping[str, Any] | None) -> Settings | None:
    """Settings from the plain values that a checkpoint holds; settings themselves and None stay as they are.

    Example:
        >>> from_plain(LoRA, {"r": 8}).r
        8
    """
    return cls(**value) if isinstance(value, Mapping) else value


def check_choice(name: str, value: object, choices: Any) -> None:  # noqa: ANN401 - a Literal
    """Refuse what is not among the values of a ``Literal``.

    Raises:
        ValueError: Naming the argument, the value and the choices.

    Example:
        >>> check_choice("policy.layout", "shared", Layout)
        Traceback (most recent call last):
        ValueError: policy.layout is 'shared'; it must be one of shared_prefix, padded
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, get_args(choices)))}")


def changes_base(lora_init: object) -> bool:
    """Whether a LoRA initialisation changes the base's weights, in our words or PEFT's.

    Example:
        >>> changes_base("pissa_niter_4"), changes_base("gaussian"), changes_base(True)
        (True, False, False)
    """
    return isinstance(lora_init, str) and lora_init.lower().startswith(LORA_INITS_THAT_CHANGE_THE_BASE)


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adaptation (Hu et al., 2021): $W + \frac{\alpha}{r} B A$ with A and B trained, W frozen.

    Attributes:
        r: Rank of the update.
        alpha: Numerator of its scale.
        dropout: Dropout on the adapter's input.
        target_modules: Names of the layers to adapt, or ``all-linear``.
        init: ``default`` (B = 0: the model starts unchanged), ``gaussian``, or an initialisation that changes the
            base (``pissa``, ``olora``, ``loftq``).
        use_rslora: Scale by α/√r instead.
        use_dora: Decompose into magnitude and direction.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    init: str = "default"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}; leave lora out for full fine-tuning")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Quantization:
    """Weights in 4 or 8 bits by bitsandbytes (Dettmers et al., 2023).

    Attributes:
        bits: 4 or 8.
        quant_type: ``nf4`` or ``fp4``; 4 bits only.
        double_quant: Quantise the scales as well; 4 bits only.
        compute_dtype: Dtype of the matrix products, and of the storage, so that FSDP2 can shard it.
    """

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class Policy:
    """A causal language model and how to load it.

    Attributes:
        path: A Hub id, a directory of a model, or a directory of an adapter (its base is loaded too).
        dtype: Of the weights. ``auto`` is float32 for full fine-tuning, which needs float32 master weights, and
            the checkpoint's own dtype under LoRA or quantisation.
        lora: Train an adapter instead of the weights.
        quantization: Load the base in 4 or 8 bits; needs ``lora``.
        layout: ``shared_prefix`` computes every prompt once and no padding; ``padded`` is the reference.
        gradient_checkpointing: Compute activations again in the backward instead of keeping them. ``selective`` keeps
            the results of attention and of the products with the weights, and computes only the rest again.
        offload_activations: Hold the inputs that checkpointed layers keep in the host's memory; a CPU has no other.
        compile: Run the decoder layers through ``torch.compile``, but for the attention of packed rows, and not while
            a generator samples. The first steps take minutes.
        trust_remote_code: Run code that comes with the model.
    """

    path: str
    dtype: Dtype = "auto"
    lora: LoRA | None = None
    quantization: Quantization | None = None
    layout: Layout = "shared_prefix"
    gradient_checkpointing: Checkpointing = False
    offload_activations: bool = False
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what can only be a slip: another layout would be computed without a word, and wrongly."""
        check_choice("policy.dtype", self.dtype, Dtype)
        check_choice("policy.layout", self.layout, Layout)
        if self.gradient_checkpointing not in (False, True, "selective"):
            raise ValueError(
                f"policy.gradient_checkpointing is {self.gradient_checkpointing!r}; it must be true, false or selective"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "policy.offload_activations moves what checkpointed layers keep: set policy.gradient_checkpointing: "
                "true as well"
            )
        if self.compile and self.gradient_checkpointing == "selective":
            raise ValueError(
                "policy.compile merges the products that policy.gradient_checkpointing: selective keeps: set that to "
                "true or false, or policy.compile to false"
            )
        for name, value, kind in (
            ("lora", self.lora, LoRA),
            ("quantization", self.quantization, Quantization),
        ):
            if not isinstance(value, kind | None):
                raise TypeError(
                    f"policy.{name} must be {kind.__name__} settings, got {type(value).__name__}: write "
                    f"{kind.__name__}(…)"
                )

    @staticmethod
    def from_config(config: "Policy | str | Mapping[str, Any]") -> "Policy":
        """A policy's settings from a path, or from the plain values that a checkpoint holds.

        Example:
            >>> Policy.from_config({"path": "a/model", "lora": {"r": 4}}).lora.r
            4
        """
        if isinstance(config, Policy):
            return config
        if isinstance(config, str):
            return Policy(config)
        nested = {
            "lora": from_plain(LoRA, config.get("lora")),
            "quantization": from_plain(Quantization, config.get("quantization")),
        }
        return Policy(**{**config, **nested})
