"""Is the replacement the same function as the original?

Both run on small random inputs, forward and backward, and are held against the original in fp64:

    ‖ours − truth‖ ≤ ‖original − truth‖ + one rounding of the output

for the value and every gradient. What runs is the module's own class on a *stand-in*: a shallow copy of the module with small random
weights. So a proof costs the same for any model size, cannot be fooled by special weights (a norm's, at initialisation, are all ones), and
needs no weight that is sharded, quantised or not there yet. Inputs come from generators of their own: no random state is touched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ._carrier import FusedLogits
from ._head import CausalLMForward, CausalLMLoss, HeadForward, output_layer
from ._mask import MASKS, MaskForward
from ._modules import GLUForward, NormForward
from ._rope import KINDS, RopeForward, of_tokens
from ._spec import Head, Rope

Place = tuple[torch.dtype, torch.device]
Run = Callable[[torch.dtype], Mapping[str, Tensor]]  # values and gradients by name, from inputs rounded once and then held in this dtype


# The original multiplies all rows of hidden states, ours those that count. Of few rows, a library on several threads sums products of
# one more or less in another order, and less exactly: MKL, of 10 and of 6.
TOKENS = 16
BATCHES = 16  # one loss may be exact by luck, in the original or in ours; this many are not


class Disagreement(Exception):
    """A replacement is not the function that it would replace, or one of the two does not run."""


class DoesNotRun(Disagreement):
    """The original does not run on such an input."""


class InDouble(TorchFunctionMode):
    """Casts to fp32 go to fp64: models compute their statistics in fp32 by name, and the truth must not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        widen = {torch.float32: torch.float64}
        args = tuple(widen.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in args)
        kwargs = {name: widen.get(arg, arg) if isinstance(arg, torch.dtype) else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def compare(original: Run, ours: Run, dtype: torch.dtype, device: torch.device, slack: float = 1.0) -> None:
    """Hold `ours` to the rule.

    Args:
        original: runs the function as it was.
        ours: runs the replacement.
        dtype: the model's dtype.
        device: where both run.
        slack: multiplies the original's own error. 1 for one function; more for a chain of them, whose roundings do not add up in order.

    Raises:
        Disagreement: the rule does not hold, or one of the two raised.
    """
    with quiet(device):
        naive = _run("the original", original, dtype)
        with InDouble():
            truth = _run("the original in fp64", original, torch.float64)
        mine = _run("the replacement", ours, dtype)
    rounding = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float64).eps  # the truth has roundings of its own, in fp64
    for name in truth:
        error, allowed = _distance(mine[name], truth[name]), slack * _distance(naive[name], truth[name])
        allowed += rounding * float(torch.linalg.vector_norm(truth[name].double()))
        # A loss that the original rounds to fp32 in an fp64 model may keep its digits.
        if mine[name].shape != naive[name].shape or (mine[name].dtype != naive[name].dtype and dtype is not torch.float64):
            got, want = (f"{t.dtype} {list(t.shape)}" for t in (mine[name], naive[name]))
            raise Disagreement(f"the {name} is {got}, the original's is {want}")
        if not error <= allowed:
            raise Disagreement(
                f"the {name} is off by {error:.3g} from the original in fp64, where {allowed:.3g} is allowed ({dtype}, {device})"
            )


def quiet(device: torch.device) -> AbstractContextManager[Any]:
    """Gradients on, autocast off: a proof gives the same answer wherever it is asked for."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, seed: int, rounded: torch.dtype, scale: Any = 1.0) -> Tensor:
    """Random numbers that are exact in `rounded`, held in `dtype`, with gradients asked for."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu") * scale
    return values.to(rounded).to(device, dtype).requires_grad_()


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], seed: int = 99) -> dict[str, Tensor]:
    """Gradients of the outputs' inner product with fixed random cotangents."""
    cotangents = [
        torch.randn(tuple(y.shape), generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64, device="cpu").bfloat16()
        for i, y in enumerate(outputs)
    ]
    grads = torch.autograd.grad(
        list(outputs), list(inputs.values()), [c.to(y.device, y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    )
    return {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def where(*modules: nn.Module) -> Place:
    """The dtype that a module computes in, and a device on which its proof can run: those of the first of them that has parameters."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = [p for module in modules for p in islice((p for p in module.parameters() if p.dtype in floats), 1)]
    if not tensors:
        return torch.float32, torch.device("cpu")
    device = tensors[0].device
    return tensors[0].dtype, torch.device("cpu") if device.type == "meta" else device


def stand_in(
    module: nn.Module, *, modules: Mapping[str, nn.Module] | None = None, parameters: Mapping[str, Any] | None = None
) -> nn.Module:
    """A shallow copy of a module, stock and without hooks, in which some children and parameters are others."""
    twin = object.__new__(type(module))
    hooks = {name: type(value)() for name, value in module.__dict__.items() if name.endswith("_hooks") and isinstance(value, dict)}
    own = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_old_forward", "_loss_function")}
    twin.__dict__.update(own, **hooks)
    twin.__dict__["_modules"] = {**module._modules, **(modules or {})}
    twin.__dict__["_parameters"] = {**module._parameters, **(parameters or {})}
    return twin


# --- one proof a kind of swap -----------------------------------------------------------------------------------------------------------


def prove_norm(swap: NormForward, at: Place) -> None:
    module, name = swap.module, swap.spec.weight
    dtype, device = at
    weight, bias = getattr(module, name, None), getattr(module, "bias", None)
    size = int(weight.shape[-1]) if weight is not None and weight.numel() else 64
    size = _width(module, size if size >= 16 else 64)  # the errors of a few elements would be luck
    # Rows from far below to far above sqrt(eps), so that eps counts in some and rounding in others; and of each, more than luck decides.
    scale = torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 3.0, 30.0], dtype=torch.float64).view(6, 1)

    def run(forward: Callable[..., Any]) -> Run:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            own = {name: normal((size,), held, device, seed=1, rounded=dtype)} if weight is not None else {}
            if swap.spec.kind == "layer" and bias is not None:
                own["bias"] = normal((size,), held, device, seed=3, rounded=dtype)
            x = normal((max(8, 256 // size), 6, size), held, device, seed=2, rounded=dtype, scale=scale)
            y = forward(stand_in(module, parameters=own), x)
            return {"output": y} | gradients([y], {"input": x} | own)

        return values

    compare(run(type(module).forward), run(swap.run), dtype, device)


def _width(module: nn.Module, otherwise: int) -> int:
    """Of the rows that a norm takes, if it insists on one."""
    shape = getattr(module, "normalized_shape", otherwise)
    return int(shape[-1] if isinstance(shape, (tuple, list)) else shape)


def prove_glu(swap: GLUForward, at: Place) -> None:
    module, spec = swap.module, swap.spec
    dtype, device = at
    wide, narrow = 64, 32
    shapes = dict.fromkeys(spec.projections, (wide, narrow)) | {spec.down: (narrow, wide)}
    if spec.packed:
        shapes[spec.packed] = (2 * wide, narrow)
    sizes = {name: value for name, value in (("intermediate_size", wide), ("hidden_size", narrow)) if hasattr(module, name)}

    def run(forward: Callable[..., Any]) -> Run:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            linears = {name: _linear(*shape, held, device, seed=i, rounded=dtype) for i, (name, shape) in enumerate(shapes.items())}
            x = normal((2, 5, narrow), held, device, seed=7, rounded=dtype, scale=3.0)
            twin = stand_in(module, modules=linears)
            twin.__dict__.update(sizes)
            if spec.dropout:
                twin.eval()
            elif not torch.equal(forward(twin, x), forward(twin, x)):
                raise Disagreement("it drops elements at random")
            y = forward(twin, x)
            return {"output": y} | gradients([y], {"input": x} | {f"{name}.weight": linear.weight for name, linear in linears.items()})

        return values

    compare(run(type(module).forward), run(swap.run), dtype, device)


def prove_mask(swap: MaskForward) -> None:
    """Asked where it may read positions, of a batch that packs nothing, the original too makes no mask."""
    states, at = torch.zeros(2, 2, 1, device="cpu"), torch.arange(2)
    call = {"config": swap.module.config, "attention_mask": None, "past_key_values": None, "position_ids": at.unsqueeze(0)}
    call |= {"inputs_embeds": states, "input_embeds": states, "cache_position": at}
    for name in swap.names:
        original = inspect.unwrap(type(swap.module).forward).__globals__[name]
        given = {key: value for key, value in call.items() if key in inspect.signature(original).parameters}
        if not MASKS[name][1](given):
            continue
        with quiet(states.device):
            try:
                mask = original(**given)
            except Exception as error:
                raise DoesNotRun(f"{name} does not run on a small input: {type(error).__name__}: {error}") from error
        if mask is not None:
            raise Disagreement(f"{name} makes a mask of a plain batch, {list(mask.shape)}")


def prove_rope(swap: RopeForward, at: Place) -> None:
    for spec in swap.specs:
        _prove_turn(swap.module, spec, at)


def _prove_turn(module: nn.Module, spec: Rope, at: Place) -> None:
    kind = KINDS[spec.kind]
    dtype, device = at
    original = inspect.unwrap(type(module).forward).__globals__[spec.function]
    takes, expected = (list(inspect.signature(f).parameters.values()) for f in (original, kind.function))
    # What is turned may have any name; it is passed by position.
    named = {"cos", "sin", "position_ids", "unsqueeze_dim"}
    calls = [[(p.name if p.name in named else "", p.default) for p in each] for each in (takes, expected)]
    if calls[0] != calls[1]:
        raise Disagreement(f"{spec.function} takes {inspect.signature(original)}, not {inspect.signature(kind.function)}")
    size, complex_tables = 32, len(expected) > 2 and expected[2].name == "freqs_cis"
    names = ("queries", "keys") if expected[1].name in ("k", "xk") else ("queries",)

    def run(function: Callable[..., Any], width: int) -> Run:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            shapes = {"queries": (2, 5, 3, size), "keys": (2, 5, 1, size)}
            inputs = {}
            for i, name in enumerate(names):
                b, t, heads, d = shapes[name]
                shape = (b, t, heads, d) if kind.by_tokens else (b, heads, t, d)
                inputs[name] = normal(shape, held, device, seed=1 + i, rounded=dtype)
            angles = normal((1, 5, width // 2), torch.float64, torch.device("cpu"), seed=3, rounded=torch.float64, scale=math.pi).detach()
            if kind.function is of_tokens:
                angles = angles[0]
            cos, sin = (kind.tables(t).to(dtype).to(device, held) for t in (angles.cos(), angles.sin()))
            tables = {p.name: {"cos": cos, "sin": sin}[p.name] for p in expected if p.name in ("cos", "sin")}
            if complex_tables:
                turn = torch.complex(*(t.to(torch.float64 if held is torch.float64 else torch.float32) for t in (cos, sin)))
                found = function(*inputs.values(), turn)
            else:
                found = function(*inputs.values(), *tables.values())
            outputs = found if isinstance(found, tuple) else (found,)
            return dict(zip(names, outputs, strict=True)) | gradients(outputs, inputs)

        return values

    compare(run(original, size), run(kind.function, size), dtype, device)
    with suppress(DoesNotRun):  # some turn whole heads only
        compare(run(original, size // 2), run(kind.function, size // 2), dtype, device)


def prove_head(root: PreTrainedModel, spec: Head, head: bool, cross_entropy: bool) -> None:
    """The causal LM's own forward over fixed hidden states: its post-processing of logits and its loss, in training and in evaluation."""
    layer = output_layer(root, spec)
    dtype, device = where(layer)
    vocab, hidden = int(root.config.get_text_config().vocab_size), 32
    takes = inspect.signature(type(root).forward).parameters
    alone = {"output_router_logits": False} if "output_router_logits" in takes else {}  # of a mixture: their loss needs those

    def run(patched: bool, training: bool, **extra: Any) -> Run:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            states = normal((2, TOKENS, hidden), held, device, seed=1, rounded=dtype)
            linear = _linear(vocab, hidden, held, device, seed=2, rounded=dtype, bias=getattr(layer, "bias", None) is not None)
            twin = _over(root, spec, states, linear)
            twin.__dict__["training"] = training
            if patched:
                install_head(twin, spec, head, cross_entropy)
            labels = torch.randint(vocab, (BATCHES, 2, TOKENS), generator=torch.Generator().manual_seed(3), device="cpu").to(device)
            labels[:, 0, 1] = extra.get("ignore_index", -100)
            outputs = [twin.forward(input_ids=each, labels=each, **extra, **alone) for each in labels]
            if patched and head and training and not all(carried(output.logits) for output in outputs):
                raise Disagreement("what the model does between its output layer and its loss is not what the entry says")
            losses = torch.stack([output.loss for output in outputs])
            inputs = {"hidden states": states} | dict(linear.named_parameters())
            return {"loss": losses} | gradients([losses], inputs) | {"logits": outputs[0].logits + 0}

        return values

    for training in (True, False):
        for extra in ({}, {"num_items_in_batch": 7, "ignore_index": 1}):
            compare(run(False, training, **extra), run(True, training, **extra), dtype, device)


def _over(root: Any, spec: Head, states: Tensor, linear: nn.Linear) -> nn.Module:
    """A stand-in of a causal LM with these hidden states and this output layer, and nothing between the two that an entry names."""
    first, _, rest = spec.name.partition(".")
    if rest and isinstance(getattr(root, first), PreTrainedModel):  # a causal LM within
        twin = stand_in(root, modules={first: _over(getattr(root, first), replace(spec, name=rest), states, linear)})
    else:
        models = [name for name, child in root.named_children() if isinstance(child, PreTrainedModel)]
        base = "model" if "model" in models else (*models, root.base_model_prefix)[0]  # of several, the others are towers
        others = {path: nn.Identity() for path in spec.before} | {spec.name: linear}
        twin = _within(root, {base: _Fixed(states, getattr(root, base)), **others})
    twin.__dict__["get_input_embeddings"] = lambda: lambda ids: states.detach()
    return twin


def _within(module: Any, others: Mapping[str, nn.Module]) -> nn.Module:
    """A stand-in in which other modules are at these paths."""
    direct = {path: other for path, other in others.items() if "." not in path}
    for name in {path.partition(".")[0] for path in others} - direct.keys():
        direct[name] = _within(getattr(module, name), {p[len(name) + 1 :]: m for p, m in others.items() if p.startswith(f"{name}.")})
    return stand_in(module, modules=direct)


def carried(logits: Tensor | FusedLogits) -> bool:
    """Whether a loss was carried all the way, and nobody needed logits."""
    return isinstance(logits, FusedLogits) and not logits.source.touched and not logits.source.steps


def install_head(root: nn.Module, spec: Head, head: bool, cross_entropy: bool) -> None:
    """Make the swaps of a causal LM's head: `head` for its two forwards, and its loss function in either case."""
    if head:
        inner = HeadForward(output_layer(root, spec))
        outer = CausalLMForward(root, inner, spec)
        inner.install()
        outer.install()
    CausalLMLoss(root, cross_entropy).install()


class _Fixed(nn.Module):
    """A base model whose hidden states are given; in all else it is the one that it stands for."""

    def __init__(self, states: Tensor, base: Any) -> None:
        super().__init__()
        self.states = states
        self.__dict__["base"] = base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["base"], name)
        return self if isinstance(value, PreTrainedModel) else value  # OPT calls its model's decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output(self.states)


class _Output:
    """What a base model returns, as far as a head reads it: anything but the hidden states is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]


def _linear(
    rows: int, columns: int, held: torch.dtype, device: torch.device, *, seed: int, rounded: torch.dtype, bias: bool = False
) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=bias, device="meta")
    linear.weight = nn.Parameter(normal((rows, columns), held, device, seed=seed, rounded=rounded, scale=columns**-0.5).detach())
    if bias:
        linear.bias = nn.Parameter(normal((rows,), held, device, seed=seed + 50, rounded=rounded).detach())
    return linear


def _run(who: str, run: Run, dtype: torch.dtype) -> Mapping[str, Tensor]:
    try:
        return {name: value.detach() for name, value in run(dtype).items()}
    except Disagreement:
        raise
    except Exception as error:
        kind = DoesNotRun if who.startswith("the original") else Disagreement
        raise kind(f"{who} does not run on a small input: {type(error).__name__}: {error}") from error


def _distance(a: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - truth.double())) if a.shape == truth.shape else math.inf
