"""What a stage needs of a model, whichever kind it is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tn_lens.core.errors import BadInput
from tn_lens.neurons.neuron import Neuron, NeuronSpace

BackendName = Literal["hooked", "bridge"]
"""TransformerLens' own model (HookedTransformer, to 3.9), or Hugging Face's within TransformerLens (TransformerBridge, from 3)."""

TOKENS_AT_ONCE = 8192
"""Columns of W_U that are converted to float32 together."""

ONE_KERNEL = {"gelu", "gelu_pytorch_tanh", "relu", "silu", "swish"}
"""Activation functions of which backward keeps their input alone; others are put together from several operations."""

Hooks = list[tuple[str, Callable[..., Any]]]
"""Hook names and functions of an activation and the hook point, whose `name` is the one given; None changes nothing."""


class Prefix(ABC):
    """Frozen keys and values of one row that others continue."""

    @abstractmethod
    def expand(self, n_rows: int) -> Any:
        """What a pass of so many rows goes on from; nothing is copied."""


class Siblings(ABC):
    """Some prompts, run once, and single positions that stand where their last tokens stand and see what those see."""

    logits: Float[Tensor, "prompt vocab"]
    """Of the untouched prompts."""
    kept: dict[str, Float[Tensor, "prompt 1 _"]]
    """Activations at the last position by the names that were asked for, heads side by side."""

    def keep(self, value: Float[Tensor, "prompt position *_"], hook: Any) -> None:
        """A hook that keeps an activation; a copy, since a view would hold all positions."""
        self.kept[hook.name] = value[:, -1:].flatten(2).clone()

    def w_out(self, layer: int) -> Float[Tensor, "neuron d_model"] | None:
        """W_out of a layer, where rows that differ in its MLP neurons may join above it; None where they may not."""
        return None

    @abstractmethod
    def run(
        self, of_layer: Mapping[int, int], hooks: Hooks, written: Mapping[int, Float[Tensor, "prompt _ d_model"]]
    ) -> Float[Tensor, "prompt row _"]:
        """The rows, as `logits_of` takes them.

        Args:
            of_layer: how many rows differ from the untouched run first at which layer; rows stand in the order of layers,
                and a hook of a layer finds at least those of its own and all lower layers.
            hooks: on activations [prompt, row, ...].
            written: what W_out of a layer makes of other activations, before bias and norm, for rows that stand behind the
                others of this layer; only where there is a `w_out`.
        """

    @abstractmethod
    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Last logits of rows that were run, or of some of them, in at least float32."""


class Backend(ABC):
    """A model of one kind, as the stages see it."""

    kind: BackendName

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """What results call the model."""
        return str(self.model.cfg.model_name)

    @property
    @abstractmethod
    def architecture(self) -> str | None:
        """Hugging Face's name of the architecture, where it is known."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.cfg.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of logits and scores: at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return torch.device(str(self.model.cfg.device))

    @property
    def n_devices(self) -> int:
        """Over how many the layers are spread."""
        return self.model.cfg.n_devices

    @property
    def n_ctx(self) -> int:
        """Tokens of the context window."""
        return self.model.cfg.n_ctx

    @property
    @abstractmethod
    def d_vocab(self) -> int:
        """Logits at a position."""

    @property
    def n_key_value_heads(self) -> int:
        """Heads of the keys and values that are kept."""
        return self.model.cfg.n_key_value_heads or self.model.cfg.n_heads

    @property
    @abstractmethod
    def space(self) -> NeuronSpace:
        """The sizes of the neuron space."""

    @property
    @abstractmethod
    def is_post_norm(self) -> bool:
        """Whether a norm follows W_O and W_out (OLMo-2, OLMo-3, Gemma-2 and -3), so that z and post have no scale.

        There f(alpha z) hardly depends on alpha > 0, and a Riemann sum from a zero baseline misses completeness.
        """

    @property
    @abstractmethod
    def unshareable(self) -> str | None:
        """Why what stands before a position cannot be run once for all that follows; None if it can."""

    def kept_by_row(self, n_tokens: int, n_rows: int) -> int:
        """Bytes that backward keeps of one sibling, without its logits where `logits_of` makes them: an upper estimate.

        Args:
            n_tokens: of the prompt.
            n_rows: siblings of a prompt.
        """
        space, size = self.space, self.dtype.itemsize
        norms = 4 * self.wide_dtype.itemsize // size  # computed in float32
        activations = 3 if str(self.model.cfg.act_fn) in ONE_KERNEL else 6
        of_attention = 6 * space.n_heads * space.d_head + 3 * space.n_heads * n_tokens
        layers = space.n_layers + 1  # the gradients of one
        return size * layers * (norms * space.d_model + of_attention + activations * space.d_mlp)

    def name_and_equip(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Give the model its name, and a copy of the tokenizer with a padding token; say whether it prepends a BOS token."""
        self.model.cfg.model_name = name
        if tokenizer is None:
            return
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.model.tokenizer = tokenizer
        self.model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
        self.model.cfg.default_prepend_bos = tokenizer.bos_token is not None

    @abstractmethod
    def check(self) -> None:
        """Refuse, or warn about, a model in which hook_z and hook_post are not what the paper calls neurons."""

    @abstractmethod
    def hooks(self, hooks: Hooks) -> AbstractContextManager[Any]:
        """Hooks on every forward pass inside a `with`, removed on leaving.

        Raises:
            BadInput: the model has no such hook point.
        """

    @abstractmethod
    def last_logits(
        self,
        tokens: Int[Tensor, "row column"],
        *,
        mask: Int[Tensor, "row column"] | None = None,
        places: Int[Tensor, " row"] | None = None,
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "row vocab"]:
        """Logits at one position of every row, in at least float32.

        Args:
            tokens: padded on the right, where nothing sees the padding, or on the left with a mask.
            mask: 0 where a row is padded on the left.
            places: columns to read; the last by default.
            prefix: what stands before every row.
        """

    @abstractmethod
    def all_logits(self, tokens: Int[Tensor, "row column"]) -> Float[Tensor, "row column vocab"]:
        """Logits at every position, in at least float32; rows may be padded on the right."""

    @abstractmethod
    def run_prefix(self, tokens: Int[Tensor, "1 column"]) -> Prefix:
        """Run what several rows begin with, and keep it for `last_logits`."""

    @abstractmethod
    def siblings(
        self, tokens: Int[Tensor, "prompt position"], mask: Int[Tensor, "prompt position"], names: set[str]
    ) -> Siblings:
        """Run prompts that are padded on the left, and get ready for single positions in place of their last ones."""

    @abstractmethod
    def written(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What a unit of each attention neuron of a layer adds to the attention's output: the rows of W_O."""

    @abstractmethod
    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        """The row of W_out or W_O that a neuron writes, and the norm that stands behind it; None where there is none."""

    @abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        """W_U and the norm before it, if there is one; None where the weights cannot be read row by row."""

    @torch.no_grad()
    def direct_logits(self, neurons: Sequence[Neuron]) -> Float[Tensor, "neuron vocab"] | None:
        """What one unit of each neuron's activation adds to the logits by itself, past all later layers.

        Its row of W_out or W_O through the norm behind that (post-norm models), the final norm and W_U. Of a norm its weights
        count, and a LayerNorm's centring, but not the division by the size of the stream: one positive factor for all tokens.

        Returns:
            Logits on the CPU less their mean over the vocabulary, which the softmax does not see; None where the weights
            cannot be read row by row.
        """
        read = self.unembedding()
        if read is None:
            return None
        w_u, final = read
        rows = [self._through(norm, row.to(w_u.device, self.wide_dtype)) for row, norm in map(self.output_row, neurons)]
        directions = torch.stack(rows) if rows else w_u.new_zeros(0, len(w_u), dtype=self.wide_dtype)
        directions = self._through(final, directions)
        parts = [directions @ columns.to(self.wide_dtype) for columns in w_u.split(TOKENS_AT_ONCE, dim=1)]
        logits = torch.cat(parts, dim=1).cpu()
        return logits - logits.mean(1, keepdim=True)

    def _through(self, norm: Any, direction: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The linear part of a norm, whatever its weights mean: what it makes of a vector of equal sizes, without its bias."""
        if norm is None:
            return direction
        signs = torch.ones(1, 1, direction.shape[-1], device=direction.device, dtype=self.dtype)
        signs[..., 1::2] = -1
        large = 64 * signs  # so that the norm's eps does not count
        weights = ((norm(large) - norm(-large)) / 2 * signs)[0, 0].to(direction)
        centred = str(self.model.cfg.normalization_type).startswith("LN")
        return (direction - direction.mean(-1, keepdim=True) if centred else direction) * weights

    def generate(self, ids: Int[Tensor, "1 column"], *, n_tokens: int, temperature: float, stop: bool) -> list[int]:
        """Sample a continuation.

        Args:
            stop: at the tokenizer's end-of-sequence token.
        """
        out = self.model.generate(
            ids.to(self.device),
            max_new_tokens=n_tokens,
            temperature=temperature,
            stop_at_eos=stop,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
        return out[0, ids.shape[1] :].tolist()


@contextmanager
def entering(blocks: Iterable[nn.Module]) -> Iterator[list[Float[Tensor, "prompt 1 d_model"]]]:
    """Collect what enters each block at the last position, before any hook point in it, while a pass runs."""
    entered: list[Tensor] = []

    def collect(_: nn.Module, given: tuple[Any, ...]) -> None:
        entered.append(given[0][:, -1:].clone())

    handles = [block.register_forward_pre_hook(collect) for block in blocks]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def visible_whole(
    seen: Bool[Tensor, "prompt position"], window: int | None = None
) -> Bool[Tensor, "prompt 1 position position"]:
    """What the positions of prompts attend to: what stands before them and is seen, and each itself.

    Args:
        seen: False where a prompt is padded.
        window: positions that a local attention sees, the own one among them; None for all.
    """
    places = torch.arange(seen.shape[1], device=seen.device)
    back = places[:, None] - places
    near = (back >= 0) & (back < (window or len(places)))
    return ((near & seen[:, None]) | (back == 0))[:, None]


def near_of(seen: Bool[Tensor, "prompt prefix"], window: int | None = None) -> Bool[Tensor, "prompt prefix"]:
    """What of the prefix a prompt's last position sees.

    Args:
        seen: False where a prompt is padded.
        window: positions that a local attention sees, the own one among them; None for all.
    """
    if window is None:
        return seen
    places = torch.arange(seen.shape[1], device=seen.device)
    return seen & (places > seen.shape[1] - window)


def visible(
    seen: Bool[Tensor, "prompt prefix"], n_rows: int, window: int | None = None
) -> Bool[Tensor, "prompt 1 row key"]:
    """What siblings attend to: the prefix, as far as the last position sees it, and each itself.

    Args:
        seen: False where a prompt is padded.
        n_rows: siblings of a prompt.
        window: positions that a local attention sees, the own one among them; None for all.
    """
    near = near_of(seen, window)
    itself = torch.eye(n_rows, dtype=torch.bool, device=seen.device).expand(len(seen), -1, -1)
    return torch.cat([near[:, None].expand(-1, n_rows, -1), itself], -1)[:, None]


def refuse_rotated(w_o: Float[Tensor, "head d_head d_model"]) -> None:
    """Refuse W_O whose rows are orthogonal within every head.

    Raises:
        BadInput: they are; the basis of z was rotated.
    """
    gram = torch.einsum("him,hjm->hij", w_o.float(), w_o.float())
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if gram.abs().sum() > 0 and (gram - diagonal.diag_embed()).abs().max() < 1e-4 * diagonal.abs().max():
        raise BadInput(
            "W_O's rows are orthogonal, as refactor_factored_attn_matrices leaves them: hook_z is in a rotated "
            "basis; load the model without that option"
        )
