"""Run a model from the disk block by block, with one block's weights in memory at a time.

transformers builds the model without weights, and knows which stored tensor each parameter is. A
block's weights are read at its turn and dropped after it. Everything is computed in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError, MachineError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 8  # sequences whose embeddings are looked up at a time


class _Reached(Exception):  # noqa: N818 - no error: it ends a run that has got far enough
    """The first block was reached."""


@dataclass(frozen=True)
class _Call:
    """A block's arguments but for the hidden states: the same for every sequence."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk:
    """A model and the list of its blocks.

    Args:
        directory: the checkpoint.
        scratch: a directory for weights that transformers stores in a form of its own.
        device: a torch device.

    Attributes:
        blocks: names of the blocks in the model, in order.

    Raises:
        MachineError: torch, transformers or accelerate is missing.
        UsageError: the model has an encoder and a decoder, or no list of blocks.
        InputError: transformers cannot open it.
    """

    def __init__(self, directory: Path, scratch: Path, device: str = "cpu") -> None:
        self._torch, self._transformers = _libraries()
        self.device = device
        self._model = self._open(directory, scratch)
        self._list, self._blocks = self._find_blocks()
        self.blocks = tuple(f"{self._list}.{i}" for i in range(len(self._blocks)))
        self._calls: list[_Call] = []
        self._in_tuples = False  # whether a block returns a tuple, its states first
        self._maps: dict[Any, Any] = {}  # by module: the weights that accelerate would load
        self._names = self._stored_names()

    def _open(self, directory: Path, scratch: Path) -> Any:
        """Return the model without weights."""
        transformers = self._transformers
        transformers.utils.logging.set_verbosity_error()  # it warns of weights on the meta device
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
        try:
            config = transformers.AutoConfig.from_pretrained(directory)
            names = config.architectures or ["AutoModel"]
            kind = getattr(transformers, names[0], transformers.AutoModel)
            if getattr(config, "is_encoder_decoder", False):
                raise UsageError(
                    f"{directory} is an encoder with a decoder, which calibration cannot walk "
                    "through: use --scale search, which needs no data"
                )
            model = kind.from_pretrained(
                directory, device_map={"": "disk"}, offload_folder=scratch, dtype="auto"
            )
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise InputError(
                f"transformers cannot open {directory}: {str(error).splitlines()[0]}. Use --scale "
                "search, which does not ask it"
            ) from error
        return model.eval()

    def _find_blocks(self) -> tuple[str, list[Any]]:
        """Return the name and the modules of the list that holds the most parameters."""
        torch = self._torch

        def size(modules: Any) -> int:
            return sum(p.numel() for p in modules.parameters())

        lists = [
            (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module)
        ]
        # Experts are lists as well, inside of a block.
        outer = [(n, m) for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists)]
        if not outer:
            raise UsageError(
                f"{type(self._model).__name__} has no list of blocks that calibration could walk "
                "through: use --scale search, which needs no data"
            )
        name, blocks = max(outer, key=lambda pair: size(pair[1]))
        return name, list(blocks)

    # -- the blocks' arguments ------------------------------------------------------------------

    def record(self, tokens: NDArray[np.int64]) -> None:
        """Run one sequence through the whole model, and record how each block is called.

        Args:
            tokens: int64 [length].

        Raises:
            UsageError: a block's input is not the output of the block before it.
        """
        torch = self._torch
        calls: dict[int, _Call] = {}
        inputs: dict[int, Any] = {}
        outputs: dict[int, Any] = {}

        def before(number: int) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                hidden, rest, named = _split(args, kwargs)
                calls[number] = _Call(rest, named)
                inputs[number] = hidden

            return hook

        def after(number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                outputs[number] = _hidden(output)
                self._in_tuples = isinstance(output, (tuple, list))

            return hook

        handles = []
        for number, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(after(number)))
        try:
            with torch.no_grad():
                self._forward(torch.from_numpy(tokens[None]))
        finally:
            for handle in handles:
                handle.remove()
        chain = len(calls) == len(self._blocks) and all(
            inputs[i] is outputs[i - 1] or torch.equal(inputs[i], outputs[i - 1])
            for i in range(1, len(self._blocks))
        )
        if not chain:
            raise UsageError(
                f"the blocks of {type(self._model).__name__} do not hand their states straight on "
                "to the next, so calibration cannot walk through them: use --scale search"
            )
        self._calls = [
            _Call(
                tuple(map(self._widened, call.args)),
                {key: self._widened(value) for key, value in call.kwargs.items()},
            )
            for _, call in sorted(calls.items())
        ]

    def _forward(self, tokens: Any) -> None:
        self._base()(input_ids=tokens, **self._no_cache())

    def _base(self) -> Any:
        """Return the model without its head."""
        return getattr(self._model, self._model.base_model_prefix, self._model)

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}

    @property
    def predicts(self) -> bool:
        """Tell whether the model predicts tokens, of which `vocabulary` are known."""
        return self._model.get_output_embeddings() is not None

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens that the model predicts."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def _widened(self, value: Any) -> Any:
        """Return an argument on the device, its float tensors as float32."""
        torch = self._torch
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._widened, value))
        if not torch.is_tensor(value):
            return value
        value = value.to(self.device)
        return value.float() if value.is_floating_point() else value

    def first_inputs(self, tokens: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the first block's inputs, some sequences at a time.

        Yields:
            Number of the first of these sequences; float32 [sequences, length, hidden].

        Args:
            tokens: int64 [sequences, length].
        """
        torch, inputs = self._torch, []

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            inputs.append(_split(args, kwargs)[0])
            raise _Reached

        # A hook of torch runs before accelerate's, which would read the block's weights.
        handle = self._blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                for start in range(0, len(tokens), _BATCH):
                    try:
                        self._forward(torch.from_numpy(tokens[start : start + _BATCH]))
                    except _Reached:
                        yield start, inputs.pop().float().cpu().numpy()
        finally:
            handle.remove()

    # -- one block ------------------------------------------------------------------------------

    @contextmanager
    def block(self, number: int) -> Iterator[Any]:
        """Yield a block's module with its weights in float32; drop them at the end."""
        with self._loaded(list(self._blocks[number].modules())):
            yield self._blocks[number]

    @contextmanager
    def _loaded(self, parts: Collection[Any]) -> Iterator[None]:
        """Hold the own weights of modules, in float32 on the device, while the statement lasts.

        From then on accelerate does not load them any more: `record` and `first_inputs` come first.
        """
        torch = self._torch
        for part in parts:
            for name, value in self._stored_weights(part).items():
                part._parameters[name] = torch.nn.Parameter(
                    value.to(self.device, torch.float32), requires_grad=False
                )
            for name, buffer in list(part.named_buffers(recurse=False)):
                part._buffers[name] = buffer.to(self.device)
        try:
            yield
        finally:
            for part in parts:
                for name, value in list(part.named_parameters(recurse=False)):
                    part._parameters[name] = torch.nn.Parameter(
                        value.to("meta"), requires_grad=False
                    )

    def _stored_weights(self, part: Any) -> Mapping[str, Any]:
        """Return a module's own weights as the checkpoint has them, by name."""
        from accelerate.hooks import remove_hook_from_module

        if part not in self._maps:
            hook = getattr(part, "_hf_hook", None)
            self._maps[part] = getattr(hook, "weights_map", None)
            if hook is not None:
                # Those without weights go as well: accelerate has them send what they are given
                # back to the CPU, where it would compute.
                remove_hook_from_module(part)
        weights = self._maps[part]
        names = [name for name, _ in part.named_parameters(recurse=False)]
        return {} if weights is None else {name: weights[name] for name in names}

    def run(self, number: int, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run one sequence through a block, inside of `block(number)`.

        Args:
            hidden: float32 [length, hidden].

        Returns:
            float32 [length, hidden].

        Raises:
            InputError: an output is not finite.
        """
        torch, call = self._torch, self._calls[number]
        states = torch.from_numpy(np.array(hidden[None])).to(self.device)
        with torch.no_grad():
            out = _hidden(self._blocks[number](states, *call.args, **call.kwargs))
        if not torch.isfinite(out).all():
            raise InputError(
                f"an output of {self.blocks[number]} is not finite: the weights are damaged, "
                "or the model needs more than float32"
            )
        output: NDArray[np.float32] = out[0].float().cpu().numpy()
        return output

    def backward(
        self, number: int, hidden: NDArray[np.float32], gradient: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Run one sequence through a block and back, inside of `block(number)`.

        Args:
            hidden: float32 [length, hidden], the block's input.
            gradient: float32 [length, hidden], by its output.

        Returns:
            float32 [length, hidden]: the gradient by its input.
        """
        torch, call = self._torch, self._calls[number]
        states = torch.from_numpy(np.array(hidden[None])).to(self.device).requires_grad_()
        with torch.enable_grad():
            out = _hidden(self._blocks[number](states, *call.args, **call.kwargs))
            out.backward(torch.from_numpy(np.array(gradient[None])).to(out))
        result: NDArray[np.float32] = states.grad[0].cpu().numpy()
        return result

    @contextmanager
    def tail(self) -> Iterator[Callable[[Any], Any]]:
        """Yield what follows the blocks, as a function.

        It takes the last block's output, a float32 tensor [1, positions, hidden] on the device,
        and returns the model's logits [1, positions, vocabulary]; or the last hidden states of a
        model without them. The positions may be any of a sequence.
        """
        torch, embeddings = self._torch, self._model.get_input_embeddings()
        inside = {part for block in self._blocks for part in block.modules()}
        parts = [p for p in self._model.modules() if p not in inside and p is not embeddings]
        given: list[Any] = []

        def embed(ids: Any, *args: Any, **kwargs: Any) -> Any:
            return torch.zeros(*ids.shape, embeddings.embedding_dim, device=self.device)

        def skip(hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.get("hidden_states") if hidden is None else hidden
            return (hidden,) if self._in_tuples else hidden

        def last(*args: Any, **kwargs: Any) -> Any:
            return (given[0],) if self._in_tuples else given[0]

        def after_blocks(states: Any) -> Any:
            given[:] = [states]
            ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=self.device)
            if self.predicts:
                return self._model(input_ids=ids, **self._no_cache()).logits.float()
            return self._base()(input_ids=ids, **self._no_cache())[0].float()

        with (
            self._loaded(parts),
            _replaced(
                {
                    embeddings: embed,
                    **dict.fromkeys(self._blocks[:-1], skip),
                    self._blocks[-1]: last,
                }
            ),
        ):
            yield after_blocks

    def nbytes(self, number: int) -> int:
        """Return the bytes of a block's weights in float32."""
        return 4 * int(sum(p.numel() for p in self._blocks[number].parameters()))

    def linears(self, number: int) -> dict[str, Any]:
        """Return the linear modules of a block, by the name of their weight in the checkpoint."""
        torch, prefix = self._torch, self.blocks[number]
        kinds = (torch.nn.Linear, self._transformers.pytorch_utils.Conv1D)
        linears = {}
        for name, module in self._blocks[number].named_modules():
            if isinstance(module, kinds):
                key = f"{prefix}.{name}.weight"
                linears[self._names.get(key, key)] = module
        return linears

    def _stored_names(self) -> Mapping[str, str]:
        """Return name in the model -> name in the checkpoint, where accelerate knows it."""
        for part in self._model.modules():
            weights = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
            index = getattr(getattr(weights, "dataset", None), "index", None)
            if index:
                return {
                    name: entry["weight_name"]
                    for name, entry in index.items()
                    if "weight_name" in entry
                }
        return {}


def _split(args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the hidden states of a block's call, and its other arguments."""
    if args:
        return args[0], tuple(args[1:]), dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _hidden(output: Any) -> Any:
    """Return the hidden states of a block's output, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def _replaced(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Have modules compute something else for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _libraries() -> tuple[Any, Any]:
    """Return (torch, transformers).

    Raises:
        MachineError: one of them or accelerate is missing, or transformers is older than 5.
    """
    try:
        import accelerate  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise MachineError(
            f"calibration needs {error.name}: pip install 'nf4cli[calibrate]'. --scale search and "
            "--importance FILE need neither torch nor text"
        ) from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MachineError(
            f"calibration needs transformers 5 (here is {transformers.__version__}): pip install "
            "'nf4cli[calibrate]'. What it writes loads in transformers 4 as well"
        )
    return torch, transformers
