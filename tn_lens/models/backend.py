"""The operations that the stages need from a model, independent of its class."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tn_lens.core.errors import BadInput
from tn_lens.core.options import BackendName
from tn_lens.models.tensors import Packed
from tn_lens.models.unembedding import COLUMNS_PER_PRODUCT
from tn_lens.neurons.neuron import Neuron
from tn_lens.neurons.sites import SITES
from tn_lens.neurons.space import NeuronSpace

FUSED_ACTIVATIONS = {"gelu", "gelu_pytorch_tanh", "relu", "silu", "swish"}
"""Activation functions whose backward pass keeps only their input. All others consist of several operations."""

Hooks = list[tuple[str, Callable[..., Any]]]
"""Pairs of a hook name and a function of (activation, hook point).

The hook point's `name` is the name given here. A function that returns None leaves the activation unchanged.
"""

Prefixes = Callable[[Int[Tensor, " row"]], Any]
"""Frozen keys and values of prefixes that rows continue: index of the prefix of each row -> cache for a pass of the rows."""

TokenRows = Int[Tensor, "row column"]
"""Token ids, or a mask of them with 0 at padding and 1 elsewhere."""

MLPOutputs = Mapping[int, Float[Tensor, "prompt _ d_model"]]
"""Layer -> outputs of its MLP for rows that differ in the layer's neurons."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to build a model."""

    name: str
    """Name of the model in results."""
    architecture: str
    """Hugging Face's name of the architecture."""
    config: PretrainedConfig
    dtype: torch.dtype
    """Dtype of the weights."""
    device: torch.device
    """Device of the weights."""
    hub: Mapping[str, Any]
    """Options of TransformerLens' own loader."""
    read: Callable[[], Any]
    """Returns the Hugging Face model, and reads its weights if it is not in memory."""


class Siblings(ABC):
    """Prompts that have been run once, and rows of one position each that replace their last position.

    Each row attends to the same prefix as the last position of its prompt, and to itself.
    """

    logits: Float[Tensor, "prompt vocab"]
    """Last logits of the prompts without intervention."""
    activations: dict[str, Float[Tensor, "prompt 1 _"]]
    """Activations at the last position by hook name, with heads concatenated."""

    def keep(self, value: Float[Tensor, "prompt position *_"], hook: Any) -> None:
        """Hook function that stores the activation at the last position."""
        # [prompt, position, ...] -> [prompt, 1, neuron]; cloned, since a view would keep all positions in memory
        self.activations[hook.name] = value[:, -1:].flatten(2).clone()

    def w_out(self, layer: int) -> Float[Tensor, "neuron d_model"] | None:
        """W_out of a layer, if rows that differ in its MLP neurons may join above the layer; None otherwise."""
        return None

    @abstractmethod
    def run(self, rows_at: Mapping[int, int], hooks: Hooks, mlp_outputs: MLPOutputs) -> Float[Tensor, "prompt row _"]:
        """Run the rows.

        Args:
            rows_at: number of rows by the first layer at which they differ from the prompt. Rows are ordered by layer,
                and a hook of a layer sees at least the rows of that layer and of all lower layers.
            hooks: hook functions of activations of shape [prompt, row, ...].
            mlp_outputs: replaced activations of a layer through its W_out projection, before bias and norm. Their rows
                follow the other rows of the layer. Only for layers that have a `w_out`.

        Returns:
            The input of `logits_of`.
        """

    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Last logits, in at least float32, of all or some of the rows that `run` returned."""
        return final


CHUNK_OPERATIONS = 5e11
"""Number of operations in one chunk on a CPU. A constant, since the size of chunks affects the rounding of results."""


class Backend(ABC):
    """Common interface to the model classes."""

    kind: BackendName

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        self.model = model
        self.name = str(cfg.model_name)
        """Name of the model in results."""
        # the configuration of a bridge has a separate field for it
        self.architecture: str | None = getattr(cfg, "architecture", None) or cfg.original_architecture
        """Hugging Face's name of the architecture; None if unknown."""
        self.dtype: torch.dtype = cfg.dtype
        """Dtype of the weights."""
        self.wide_dtype = torch.promote_types(self.dtype, torch.float32)
        """Dtype of logits and scores: at least float32."""
        self.n_devices: int = cfg.n_devices
        """Number of devices that the layers are distributed over."""
        self.n_ctx: int = cfg.n_ctx
        """Size of the context window in tokens."""
        self.d_vocab: int = cfg.d_vocab_out
        """Number of logits at one position."""
        self.n_embeddings: int = cfg.d_vocab
        """Number of tokens that have an embedding."""
        self.n_key_value_heads: int = cfg.n_key_value_heads or cfg.n_heads
        """Number of heads of the cached keys and values."""

    @cached_property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def chunk_size(self, most: int, passes: float | int) -> int:
        """Number of prompts in one chunk of a run: `most`, or fewer on a CPU, where a chunk takes about five seconds on two cores.

        Args:
            most: largest number of prompts.
            passes: operations per weight that one prompt takes.
        """
        if self.device.type != "cpu":
            return most
        return max(1, min(most, int(CHUNK_OPERATIONS / max(passes * self.n_parameters, 1))))

    @property
    def is_half(self) -> bool:
        """Whether the weights have 16 bits; the final norm and the unembedding are computed in float32 nevertheless."""
        return self.dtype.itemsize == 2

    @property
    def device(self) -> torch.device:
        """Device of the input tokens."""
        return torch.device(str(self.model.cfg.device))

    @property
    @abstractmethod
    def d_mlp(self) -> int:
        """Number of neurons of one MLP; 0 for attention-only models."""

    @property
    def space(self) -> NeuronSpace:
        """The model's neuron space."""
        cfg = self.model.cfg
        return NeuronSpace(
            n_layers=cfg.n_layers, d_mlp=self.d_mlp, n_heads=cfg.n_heads, d_head=cfg.d_head, d_model=cfg.d_model
        )

    @property
    @abstractmethod
    def is_post_norm(self) -> bool:
        """Whether W_O and W_out are followed by a norm (OLMo-2, OLMo-3, Gemma-2, Gemma-3).

        The norm removes the scale of z and post: f(alpha z) hardly depends on alpha > 0, and a Riemann sum from a zero
        baseline does not satisfy completeness.
        """

    @property
    @abstractmethod
    def unshareable(self) -> str | None:
        """Why the prefix of a prompt cannot be run once for all rows that replace its last position; None if it can."""

    def bytes_per_row(self, n_tokens: int, n_rows: int) -> int:
        """Upper estimate of the bytes that the backward pass keeps for one row of `Siblings`.

        Logits are not included if `Siblings.logits_of` computes them.

        Args:
            n_tokens: number of tokens of the prompt.
            n_rows: number of rows per prompt.
        """
        space, size = self.space, self.dtype.itemsize
        norms = 4 * self.wide_dtype.itemsize // size  # norms are computed in float32
        attention = 6 * space.n_heads * space.d_head + 3 * space.n_heads * n_tokens
        activations = 3 if str(self.model.cfg.act_fn) in FUSED_ACTIVATIONS else 6
        layers = space.n_layers + 1  # one more for the gradients of the layer being differentiated
        return size * layers * (norms * space.d_model + attention + activations * space.d_mlp)

    def set_name_and_tokenizer(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Set the model's name, and a copy of the tokenizer that has a padding token.

        Also records in the configuration whether the tokenizer prepends a BOS token.
        """
        self.model.cfg.model_name = name
        if tokenizer is None:
            return
        tokenizer = copy.deepcopy(tokenizer)  # the caller's tokenizer is not modified
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.model.tokenizer = tokenizer
        self.model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
        self.model.cfg.default_prepend_bos = tokenizer.bos_token is not None

    def check(self) -> None:
        """Reject, or warn about, models in which hook_z and hook_post are not the neurons of the paper.

        Raises:
            BadInput: weights that autograd rejects.
        """
        name = next((name for name, parameter in self.model.named_parameters() if parameter.is_inference()), None)
        if name is not None:
            raise BadInput(
                "expected weights that autograd accepts, but this model was built under torch.inference_mode() "
                f"({name}); build or load it outside of inference mode"
            )

    @abstractmethod
    def hooks(self, hooks: Hooks) -> AbstractContextManager[Any]:
        """Context manager that adds hooks to every forward pass, and removes them on exit.

        Raises:
            BadInput: the model has no such hook point.
        """

    @abstractmethod
    def last_logits(
        self,
        tokens: TokenRows,
        *,
        mask: TokenRows | None = None,
        places: Int[Tensor, " row"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "row vocab"]:
        """Logits at one position of every row, in at least float32.

        Args:
            tokens: rows padded on the left, with a mask, or on the right, where causal attention hides the padding.
            mask: 0 at padding on the left, 1 elsewhere.
            places: column to read in each row. Default: the last column.
            cache: keys and values of the positions that precede the rows, from `empty_cache`.
        """

    @abstractmethod
    def packed_logits(self, rows: Packed, ends: Int[Tensor, "end 2"], cache: Any = None) -> Float[Tensor, "end vocab"]:
        """Logits at some columns of packed rows, in at least float32. Only for models that are not `unshareable`.

        Args:
            rows: the rows.
            ends: row and column of each place to read.
            cache: keys and values of the `n_before` positions that precede the rows, from `run_prefixes`.
        """

    @abstractmethod
    def all_logits(self, tokens: TokenRows, *, start: int = 0) -> Float[Tensor, "row _ vocab"]:
        """Logits at every position from column `start` on, in at least float32. Rows may be padded on the right."""

    @abstractmethod
    def empty_cache(self) -> Any:
        """A cache of keys and values for one row, to which every forward pass appends."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a text: those of the checkpoint, or the tokenizer's if the checkpoint names none."""
        ids = vars(self.model).get("end_ids") or [getattr(self.model.tokenizer, "eos_token_id", None)]
        return frozenset(each for each in ids if each is not None)

    def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """Continue a prompt with the most probable token, again and again.

        Args:
            ids: prompt tokens.
            n_tokens: maximum number of new tokens.

        Returns:
            The new tokens, without the token that ends the text.
        """
        # without a cache where its keys and values would change in later passes
        cache = None if self.unshareable else self.empty_cache()
        tokens, written = list(ids), list[int]()
        while len(written) < n_tokens:
            logits = self.last_logits(torch.tensor([tokens], device=self.device), cache=cache)
            written.append(int(logits[0].argmax()))
            if written[-1] in self.end_ids:
                return written[:-1]
            tokens = [*ids, *written] if cache is None else written[-1:]
        return written

    @abstractmethod
    def run_prefixes(self, tokens: Int[Tensor, "prefix column"]) -> Prefixes:
        """Run beginnings of rows and cache them. The rows view a single prefix, and copy one of several."""

    @abstractmethod
    def siblings(self, tokens: TokenRows, mask: TokenRows, names: set[str]) -> Siblings:
        """Run prompts once, as preparation for rows that replace their last position.

        Args:
            tokens: prompts padded on the left.
            mask: 0 at padding, 1 elsewhere.
            names: hook names of the activations to store.
        """

    @abstractmethod
    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of a layer: each row is the contribution of one unit of an attention neuron to the attention output."""

    @abstractmethod
    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        """The row of W_out or W_O of an MLP or attention neuron, and the norm that follows it, if any."""

    @abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        """W_U and the norm before it, if any; None if rows of the weights cannot be read."""

    @torch.no_grad()
    def direct_logits(self, neurons: Sequence[Neuron]) -> Float[Tensor, "neuron vocab"] | None:
        """Direct logit attribution: the effect of one unit of activation on the logits, without later layers.

        The neuron's row of W_out or W_O passes through the norm that follows it (post-norm models), the final norm and
        W_U. A residual-stream neuron is a unit vector of the stream, followed by the final norm and W_U only. Norms are
        linearised: the weights of a norm and the centring of a LayerNorm are applied, but not the division by the scale
        of the stream, which is one positive factor for all tokens.

        Returns:
            Logits on the CPU minus their mean over the vocabulary, to which the softmax is invariant; None if rows of
            the weights cannot be read.
        """
        unembedding = self.unembedding()
        if unembedding is None:
            return None
        w_u, final_norm = unembedding
        directions = w_u.new_zeros(len(neurons), len(w_u), dtype=self.wide_dtype)  # [neuron, d_model]
        for row, neuron in enumerate(neurons):
            if SITES[neuron.site].width == "d_model":
                directions[row, neuron.index] = 1
            else:
                weights, norm = self.output_row(neuron)
                directions[row] = self._apply_norm(norm, weights.to(w_u.device, self.wide_dtype))
        directions = self._apply_norm(final_norm, directions)
        # W_U is converted in blocks of columns, since a float32 copy of the whole matrix would cost too much memory
        blocks = [directions @ columns.to(self.wide_dtype) for columns in w_u.split(COLUMNS_PER_PRODUCT, dim=1)]
        logits = torch.cat(blocks, dim=1).cpu()  # [neuron, vocab]
        return logits - logits.mean(1, keepdim=True)

    def _apply_norm(self, norm: Any, direction: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The linear part of a norm, without its bias and without the division by the scale.

        The weights are measured, because model families store them differently (Gemma adds 1 to them): a vector of mean
        0 whose entries have equal magnitude is only multiplied by the weights.
        """
        if norm is None:
            return direction
        signs = torch.ones(1, 1, direction.shape[-1], device=direction.device, dtype=self.dtype)
        signs[..., 1::2] = -1
        large = 64 * signs  # large, so that the eps of the norm is negligible
        # the difference of both signs cancels the bias; [1, 1, d_model] -> [d_model]
        weights = ((norm(large) - norm(-large)) / 2 * signs)[0, 0].to(direction)
        is_layer_norm = str(self.model.cfg.normalization_type).startswith("LN")
        return (direction - direction.mean(-1, keepdim=True) if is_layer_norm else direction) * weights

    def generate(self, ids: Int[Tensor, "1 column"], *, n_tokens: int, temperature: float, stop: bool) -> list[int]:
        """Sample a continuation.

        Args:
            ids: prompt tokens.
            n_tokens: maximum number of new tokens.
            temperature: sampling temperature.
            stop: whether to stop at the tokenizer's end-of-sequence token.

        Returns:
            The new tokens, without the prompt.
        """
        output = self.model.generate(
            ids.to(self.device),
            max_new_tokens=n_tokens,
            temperature=temperature,
            stop_at_eos=stop,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
        return output[0, ids.shape[1] :].tolist()
